"""A new request among running streams: the time to its first token, against that alone and the time of one step.

    python bench/newcomer.py --shape toy --streams 16 --prompt 128

In turns, `--rounds` times: `--newcomers` requests one after another with nothing else running; as many among the
streams from a tenant that runs nothing; as many from the streams' own tenant. Each comes as a step of the streams
begins, and waits it out. The engine alone, drafting off, as in `long_prompt.py`. The mark is 1.5 times the median alone
plus one of the streams' steps.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from long_prompt import NUM_STREAM_TOKENS, Bench, quantile
from shapes import SHAPES


def first_tokens(bench: Bench, options: argparse.Namespace, tenant: str, *, among: bool) -> list[float]:
    """Seconds to the first token of one newcomer after another."""
    seconds = []
    for _ in range(options.newcomers):
        bench.steps(most=2 * among)  # the streams go on between two of them
        waited = bench.steps(most=1 * among)
        seconds.append(sum(waited) + sum(bench.steps(until=bench.submit(options.prompt, 1, tenant))))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a newcomer's prompt")
    parser.add_argument("--chunk", type=int, default=512, help="the token budget of a step")
    parser.add_argument("--newcomers", type=int, default=20, help="of each kind in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kv-mib", type=int, default=512, help="of the KV cache")
    parser.add_argument("--models", type=Path, default=Path("/tmp/loraplex-bench"), help="where the weights are kept")
    options = parser.parse_args()
    bench = Bench(options)
    steps: list[float] = []
    found: dict[str, list[float]] = {"alone": [], "of another tenant": [], "of the same tenant": []}
    for number in range(options.rounds + 1):
        alone = first_tokens(bench, options, "another", among=False)
        streams = [bench.submit(NUM_STREAM_TOKENS, 4000, "streams") for _ in range(options.streams)]
        bench.steps(most=2 + options.streams * NUM_STREAM_TOKENS // options.chunk)  # their prompts
        between = bench.steps(most=options.newcomers)
        assert len(bench.core.scheduler.running) == options.streams
        another = first_tokens(bench, options, "another", among=True)
        same = first_tokens(bench, options, "streams", among=True)
        for stream in streams:
            bench.core.end(stream, aborted=True)
        if number:  # the first round warms up
            steps += between
            for times, more in zip(found.values(), (alone, another, same), strict=True):
                times += more
    step, by_itself = statistics.median(steps), statistics.median(found["alone"])
    print(f"{options.shape}, {options.streams} streams, newcomers of {options.prompt} tokens, "
          f"{len(found['alone'])} of each kind; a step of the streams {step * 1e3:.1f} ms")  # fmt: skip
    for name, times in found.items():
        middle = statistics.median(times)
        print(f"{name:20} first token p50 {middle * 1e3:7.1f} ms, p99 {quantile(times, 0.99) * 1e3:7.1f} ms"
              f"   p50 less a step over that alone {(middle - step * (name != 'alone')) / by_itself:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
