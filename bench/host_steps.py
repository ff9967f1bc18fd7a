"""What a decoding step costs beside its forward pass: scheduling, batch, sampling, emissions and their message.

    python bench/host_steps.py --requests 8,32,64,128,256 --temperature 0

The model's computing is left out: every step gets ready logits of the toy's vocabulary at once. What is left is Python
of the engine's process, which a GPU waits for in every step, and small steps on a CPU too. Adapters of `--ranks` are
dealt out in turn, tenants are eight, nothing is drafted. Prints medians: microseconds a step, and a step's request.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, make_adapter, make_base

from loraplex.config.settings import Adapters, EngineSettings, Model, Settings
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.loading import load_machine
from loraplex.engines.native.messages import encode
from loraplex.engines.native.worker import stepped
from loraplex.engines.protocol import Adapter, GenerateRequest, SamplingParams

SHAPE = "toy"


def make_core(most: int, models: Path) -> EngineCore:
    """An engine that runs up to so many requests at once, and computes nothing."""
    settings = Settings(
        model=Model(path=str(make_base(SHAPE, models)), name=SHAPE),
        engine=EngineSettings(max_running=most, max_batch_tokens=4096, kv_cache_bytes=2**29, max_draft_tokens=0),
        adapters=Adapters(device_bytes=2**29, host_bytes=2**29),
    )
    core = EngineCore(load_machine(settings, lambda progress: None))
    runner: Any = core._machine.runner
    ready = torch.randn(most, SHAPES[SHAPE].vocab, generator=torch.Generator().manual_seed(0))
    runner._through_model = lambda token_ids, positions, sampled: ready[: len(sampled)]
    if runner.graphs is not None:
        runner.graphs._compute = lambda inputs, kind: ready[: kind.num_sampled]
    return core


def phases_of(core: EngineCore) -> dict[str, float]:
    return dict(core._machine.runner.stopwatch.seconds)


def submit(core: EngineCore, adapters: list[Adapter | None], num_requests: int, options: argparse.Namespace) -> None:
    params = SamplingParams(max_tokens=options.tokens, temperature=options.temperature, ignore_eos=True)
    for number in range(num_requests):
        core.submit(
            GenerateRequest(
                request_id=f"{num_requests}-{number}",
                prompt_token_ids=tuple(2 + (number * 7 + place) % 2000 for place in range(options.prompt)),
                sampling=params,
                adapter=adapters[number % len(adapters)],
                tenant=f"tenant {number % 8}",
            )
        )


def measure(core: EngineCore, num_requests: int) -> str:
    """What steps cost while so many requests decode, all of them."""
    parts: defaultdict[str, list[float]] = defaultdict(list)
    while core.has_work or core.is_preparing:
        before, began = phases_of(core), time.perf_counter()
        emissions = core.step()
        done = time.perf_counter()
        encode(stepped(core.scheduler.num_steps, emissions))
        ended = time.perf_counter()
        if len(emissions) == num_requests and not any(emission.is_last for emission in emissions):
            parts["step"].append(ended - began)
            parts["message"].append(ended - done)
            for name, seconds in phases_of(core).items():
                parts[name].append(seconds - before.get(name, 0.0))
    medians = {name: statistics.median(some) * 1e6 for name, some in parts.items()}
    told = "  ".join(f"{name} {median:.0f}" for name, median in medians.items())
    return f"{num_requests:4} requests  {medians['step'] / num_requests:5.1f} µs each:  {told}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", default="8,32,64,128,256", help="how many at once, separated by commas")
    parser.add_argument("--ranks", default="8,16,32,64", help="of the adapters, separated by commas; 0: the base")
    parser.add_argument("--tokens", type=int, default=80, help="that each request is answered with")
    parser.add_argument("--prompt", type=int, default=30, help="tokens of each prompt")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--models", type=Path, default=Path("/tmp/loraplex-bench"), help="where the weights are kept")
    options = parser.parse_args()
    adapters = [
        make_adapter(SHAPE, int(rank), number, options.models) if rank != "0" else None
        for number, rank in enumerate(options.ranks.split(","))
    ]
    counts = [int(count) for count in options.requests.split(",")]
    core = make_core(max(counts), options.models)
    submit(core, adapters, len(adapters), options)
    while core.has_work or core.is_preparing:  # which brings the adapters
        core.step()
    for count in counts:
        submit(core, adapters, count, options)
        print(measure(core, count))


if __name__ == "__main__":
    main()
