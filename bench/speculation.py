"""What drafting gains: tokens a second with and without it, on a prompt that repeats itself and on a random one.

    python bench/speculation.py --shape toy --tokens 128

In turns, `--rounds` times, one request alone; figures are medians. A random model's greedy answers soon repeat
themselves, so the random prompt is answered by sampling at temperature 2: there drafting has to switch itself off.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

from shapes import SHAPES, make_base

from loraplex.config.settings import EngineSettings, Model, Settings
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.loading import load_machine
from loraplex.engines.protocol import GenerateRequest, SamplingParams


def speed(core: EngineCore, name: str, prompt: list[int], sampling: SamplingParams) -> float:
    """Tokens a second of one request, prefill included."""
    core.submit(GenerateRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling))
    num_tokens, began = 0, time.perf_counter()
    while core.has_work:
        num_tokens += sum(emission.sampled is not None for emission in core.step())
    return num_tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--drafts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--models", type=Path, default=Path("/tmp/loraplex-bench"), help="where the weights are kept")
    options = parser.parse_args()
    base = make_base(options.shape, options.models)
    cores = {}
    for drafts in (0, options.drafts):
        engine = EngineSettings(num_threads=options.threads, kv_cache_bytes=2**28, max_draft_tokens=drafts)
        settings = Settings(model=Model(path=str(base), name=options.shape), engine=engine)
        cores[drafts] = EngineCore(load_machine(settings, lambda progress: None))
    rng = random.Random(0)
    phrase = [rng.randrange(10, 2000) for _ in range(12)]
    cases = {
        "repetitive": (phrase * 8, SamplingParams(max_tokens=options.tokens, temperature=0.0, ignore_eos=True)),
        "random": (
            [rng.randrange(10, 2000) for _ in range(96)],
            SamplingParams(max_tokens=options.tokens, temperature=2.0, seed=1, ignore_eos=True),
        ),
    }
    for case, (prompt, sampling) in cases.items():
        figures: dict[int, list[float]] = {drafts: [] for drafts in cores}
        for number in range(options.rounds + 1):
            for drafts, core in cores.items():
                figure = speed(core, f"{case}-{number}", prompt, sampling)
                figures[drafts] += [figure] if number else []  # the first round warms up
        plain, drafted = (statistics.median(figures[drafts]) for drafts in cores)
        stats = cores[options.drafts].stats()
        print(f"{case:11} plain {plain:8.1f} tokens/s, drafted {drafted:8.1f}: {drafted / plain:.2f} x; so far "
              f"{stats.total_accepted_draft_tokens} of {stats.total_draft_tokens} drafts accepted")  # fmt: skip


if __name__ == "__main__":
    main()
