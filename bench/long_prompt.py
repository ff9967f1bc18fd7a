"""One long prompt among running streams: how much longer they wait for a token, against the time of one chunk.

    python bench/long_prompt.py --shape toy --streams 16 --prompt 8000

In turns, `--rounds` times: the prompt by itself, chunk by chunk; the streams by themselves; the streams while such a
prompt is computed among them. The engine alone, without process or gateway: every stream gets a token in every step,
so that a step is the time between two tokens.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

from shapes import SHAPES, make_base

from loraplex.config.settings import EngineSettings, Model, Settings
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.loading import load_machine
from loraplex.engines.protocol import Adapter, GenerateRequest, SamplingParams

NUM_STREAM_TOKENS = 30  # of a stream's prompt


def quantile(values: list[float], share: float) -> float:
    """The value that so large a share is at most."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


class Bench:
    """One core and its requests, whose prompts are random, so that no prefix is found."""

    def __init__(self, options: argparse.Namespace) -> None:
        engine = EngineSettings(
            num_threads=options.threads, kv_cache_bytes=options.kv_mib * 2**20, max_batch_tokens=options.chunk,
            max_running=options.streams + 1, max_draft_tokens=0,
        )  # fmt: skip
        path = str(make_base(options.shape, options.models))
        settings = Settings(model=Model(path=path, name=options.shape), engine=engine)
        self.core = EngineCore(load_machine(settings, lambda progress: None))
        self._vocabulary = SHAPES[options.shape].vocab
        self._rng = random.Random(0)
        self._count = 0

    def submit(self, num_prompt: int, max_tokens: int, tenant: str = "", adapter: Adapter | None = None) -> str:
        self._count += 1
        prompt = tuple(self._rng.randrange(10, self._vocabulary) for _ in range(num_prompt))
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(
            request_id=str(self._count), prompt_token_ids=prompt, sampling=sampling, tenant=tenant, adapter=adapter
        )
        self.core.submit(request)
        return str(self._count)

    def steps(self, until: str | None = None, most: int = 10**6) -> list[float]:
        """Seconds of each step: so many, or up to the one that gives that request a token."""
        seconds: list[float] = []
        while len(seconds) < most:
            began = time.perf_counter()
            emissions = self.core.step()
            seconds.append(time.perf_counter() - began)
            errors = [emission.error for emission in emissions if emission.error is not None]
            if errors:
                raise errors[0]
            if any(emission.sequence.request_id == until for emission in emissions):
                break
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=8000, help="tokens of the long prompt")
    parser.add_argument("--chunk", type=int, default=512, help="the token budget of a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kv-mib", type=int, default=512, help="of the KV cache")
    parser.add_argument("--models", type=Path, default=Path("/tmp/loraplex-bench"), help="where the weights are kept")
    options = parser.parse_args()
    bench = Bench(options)
    chunks: list[float] = []
    alone: list[float] = []
    among: list[float] = []
    for number in range(options.rounds + 1):
        by_itself = bench.steps(until=bench.submit(options.prompt, 1))
        streams = [bench.submit(NUM_STREAM_TOKENS, 4000) for _ in range(options.streams)]
        bench.steps(most=2 + options.streams * NUM_STREAM_TOKENS // options.chunk)  # their own prompts
        before = bench.steps(most=3 * len(by_itself))
        assert len(bench.core.scheduler.running) == options.streams
        during = bench.steps(until=bench.submit(options.prompt, 1))
        for stream in streams:
            bench.core.end(stream, aborted=True)
        if number:  # the first round warms up
            chunks, alone, among = chunks + by_itself, alone + before, among + during
    assert bench.core.stats().total_cached_prompt_tokens == bench.core.stats().total_preemptions == 0
    print(f"{options.shape}, {options.streams} streams, prompts of {options.prompt} tokens, chunks of {options.chunk}: "
          f"{len(among)} steps with it, {len(alone)} without, {len(chunks)} of it alone")  # fmt: skip
    for name, values in (("a chunk alone", chunks), ("streams alone", alone), ("streams with the prompt", among)):
        print(f"{name:24} p50 {quantile(values, 0.5) * 1e3:8.1f} ms, p99 {quantile(values, 0.99) * 1e3:8.1f} ms")
    rise = quantile(among, 0.99) - quantile(alone, 0.99)
    share = rise / quantile(chunks, 0.99)
    print(f"p99 between two tokens rises by {rise * 1e3:.1f} ms: {share:.2f} of the p99 of one chunk")


if __name__ == "__main__":
    main()
