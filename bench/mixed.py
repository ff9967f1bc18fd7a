"""Mixed adapters against base-only in the same engine, in one run and in alternating order.

    python bench/mixed.py --shape toy --ranks 8,16,32,64 --requests 8 --tokens 32

Each round decodes `--requests` sequences for `--tokens` tokens, once all on the base and once with the adapters dealt
out in turn, with drafting off; prompts are found in the prefix cache after the first round. Prints output tokens/s of
both (medians over `--rounds`) and their ratio. No gateway, no process boundary.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from shapes import SHAPES, make_adapter, make_base

from loraplex.config.settings import Adapters, EngineSettings, Model, Settings
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.loading import load_machine
from loraplex.engines.protocol import Adapter, GenerateRequest, SamplingParams


def decode(core: EngineCore, adapters: list[Adapter | None], options: argparse.Namespace, tag: str) -> float:
    """Output tokens a second of one batch of requests, prefill included."""
    params = SamplingParams(max_tokens=options.tokens, temperature=options.temperature, ignore_eos=True)
    for number in range(options.requests):
        core.submit(
            GenerateRequest(
                request_id=f"{tag}-{number}",
                prompt_token_ids=tuple(range(2, 2 + options.prompt)),
                sampling=params,
                adapter=adapters[number % len(adapters)],
            )
        )
    num_tokens, began = 0, time.perf_counter()
    while core.has_work:
        num_tokens += sum(emission.sampled is not None for emission in core.step())
    return num_tokens / (time.perf_counter() - began)


def options_of(description: str | None) -> argparse.ArgumentParser:
    """What is asked of one engine without a gateway: a shape, adapters, requests, and how often."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    parser.add_argument("--ranks", default="8,16,32,64", help="of the adapters, separated by commas; 0: the base")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="that each request is answered with")
    parser.add_argument("--prompt", type=int, default=30, help="tokens of each prompt")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quantization", choices=("none", "int8"), default="none", help="as model.quantization")
    parser.add_argument("--models", type=Path, default=Path("/tmp/loraplex-bench"), help="where the weights are kept")
    return parser


def make_adapters(options: argparse.Namespace) -> list[Adapter | None]:
    return [
        make_adapter(options.shape, int(rank), number, options.models) if rank != "0" else None
        for number, rank in enumerate(options.ranks.split(","))
    ]


def make_core(options: argparse.Namespace, *, eager: bool = False) -> EngineCore:
    """An engine of the shape that drafts nothing. `eager`: nor does it replay captured steps."""
    settings = Settings(
        model=Model(
            path=str(make_base(options.shape, options.models)), name=options.shape, quantization=options.quantization
        ),
        engine=EngineSettings(
            num_threads=options.threads, kv_cache_bytes=2**30, max_draft_tokens=0, enforce_eager=eager
        ),
        adapters=Adapters(device_bytes=4 * 2**30, host_bytes=4 * 2**30),
    )
    return EngineCore(load_machine(settings, lambda progress: None))


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--eager", action="store_true", help="never replay a captured step")
    options = parser.parse_args()
    adapters, core = make_adapters(options), make_core(options, eager=options.eager)
    figures: dict[str, list[float]] = {"base": [], "mixed": []}
    for number in range(options.rounds + 1):
        for tag, who in (("base", [None]), ("mixed", adapters)):
            figure = decode(core, list(who), options, f"{tag}{number}")
            if number:  # the first round warms up and loads
                figures[tag].append(figure)
    medians = {tag: statistics.median(values) for tag, values in figures.items()}
    print(f"{options.shape}, {options.requests} requests, ranks {options.ranks}, {options.tokens} tokens each")
    for tag, value in medians.items():
        print(f"  {tag:6} {value:9.1f} tokens/s")
    print(f"  ratio  {medians['mixed'] / medians['base']:9.2f}")


if __name__ == "__main__":
    main()
