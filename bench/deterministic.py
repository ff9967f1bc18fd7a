"""What `engine.deterministic` costs: the same requests with and without it, in alternating order.

    python bench/deterministic.py --shape toy --ranks 8,16,32,64 --requests 8 --tokens 32 --prompt 30

Prints output tokens/s of both (medians over `--rounds`, prefill included), their ratio, and how many tokens share a
forward pass with it. No gateway, no process boundary. `--tokens 1 --prompt 400` shows what it costs a prompt.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from mixed import decode, make_adapters, options_of
from shapes import make_base

from loraplex.config.settings import Adapters, EngineSettings, Model, Settings
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.loading import load_machine


def main() -> None:
    options = options_of(__doc__).parse_args()
    base, adapters = make_base(options.shape, options.models), make_adapters(options)
    machines = {
        name: load_machine(_settings(base, options, deterministic=name == "deterministic"), lambda progress: None)
        for name in ("usual", "deterministic")
    }
    cores = {name: EngineCore(machine) for name, machine in machines.items()}
    figures: dict[str, list[float]] = {name: [] for name in cores}
    for number in range(options.rounds + 1):
        for name, core in cores.items():
            figure = decode(core, adapters, options, f"{name}{number}")
            if number:  # the first round warms up and loads
                figures[name].append(figure)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    print(f"{options.shape}, {options.requests} requests, ranks {options.ranks}, prompts of {options.prompt} tokens")
    for name, value in medians.items():
        print(f"  {name:14} {value:9.1f} tokens/s")
    print(f"  ratio          {medians['deterministic'] / medians['usual']:9.2f}")
    print(f"  tokens a pass  {machines['deterministic'].runner.tile or 0:9}")


def _settings(base: Path, options: argparse.Namespace, *, deterministic: bool) -> Settings:
    return Settings(
        model=Model(path=str(base), name=options.shape),
        engine=EngineSettings(num_threads=options.threads, kv_cache_bytes=2**29, deterministic=deterministic),
        adapters=Adapters(device_bytes=2**30, host_bytes=2 * 2**30),
    )


if __name__ == "__main__":
    main()
