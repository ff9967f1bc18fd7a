"""Steps through the model with its decoder layers compiled against the same layers as they are, in turn.

    python bench/compiled.py --shape toy --ranks 8,16,32,64

Each round submits `--requests` prompts that no cache has and answers each with `--tokens`, the adapters dealt out in
turn: once as the layers are, once compiled by torch's default backend for any number of tokens. Nothing is drafted, and
no step is replayed. Prints milliseconds of the forward pass (medians over all rounds) and what compiling took.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from mixed import make_adapters, make_core, options_of
from shapes import SHAPES

from loraplex.engines.protocol import Adapter, GenerateRequest, SamplingParams


class Engine:
    """One engine whose forward passes are timed. `compiled` is whether its layers are those that were compiled."""

    def __init__(self, options: argparse.Namespace, adapters: list[Adapter | None]) -> None:
        self._core = make_core(options, eager=True)
        self._adapters = adapters
        self._options = options
        self._took: list[float] = []
        runner: Any = self._core._machine.runner
        self._layers: list[Any] = [*runner._model.model.layers]
        runner.logits = self._timed(runner.logits)

    def compile(self) -> None:
        """Let torch compile the layers, which it does when they are first called."""
        for layer in self._layers:
            layer.compile(fullgraph=True, dynamic=True)

    def uncompile(self) -> None:
        """As the layers were. What was compiled is kept and found again."""
        for layer in self._layers:
            layer._compiled_call_impl = None  # torch knows no other way back

    def round(self, seed: int) -> tuple[float, list[float]]:
        """Seconds of the prefill and of each decode step, with prompts of this seed."""
        chance, options = random.Random(seed), self._options
        sampling = SamplingParams(max_tokens=options.tokens, temperature=0.0, ignore_eos=True)
        for number in range(options.requests):
            self._core.submit(
                GenerateRequest(
                    request_id=f"{seed}-{number}",
                    prompt_token_ids=tuple(chance.choices(range(2, SHAPES[options.shape].vocab), k=options.prompt)),
                    sampling=sampling,
                    adapter=self._adapters[number % len(self._adapters)],
                )
            )
        self._took.clear()
        while self._core.has_work:
            self._core.step()
        prefill, *decodes = self._took
        return prefill, decodes

    def _timed(self, logits: Callable[..., Any]) -> Callable[..., Any]:
        def timed(batch: object) -> Any:
            began = time.perf_counter()
            found = logits(batch)
            self._took.append(time.perf_counter() - began)
            return found

        return timed


def main() -> None:
    parser = options_of(__doc__)
    parser.set_defaults(tokens=17, rounds=7)
    options = parser.parse_args()
    adapters = make_adapters(options)
    engine = Engine(options, adapters)
    ways = {"as it is": engine.uncompile, "compiled": engine.compile}
    first_round: dict[str, float] = {}  # in which adapters are read, and layers compiled
    for number, (way, set_up) in enumerate(ways.items()):
        set_up()
        began = time.perf_counter()
        engine.round(-1 - number)
        first_round[way] = time.perf_counter() - began
    prefills: dict[str, list[float]] = {way: [] for way in ways}
    decodes: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(options.rounds):
        for turn, (way, set_up) in enumerate(ways.items()):
            set_up()
            prefill, steps = engine.round(2 * number + turn)
            prefills[way].append(prefill)
            decodes[way] += steps
    threads = torch.get_num_threads()
    print(f"{options.shape}, {options.requests} requests of {options.prompt}, ranks {options.ranks}, {threads} threads")
    for way in ways:
        prefill, decode = statistics.median(prefills[way]), statistics.median(decodes[way])
        print(f"  {way:9} prefill {prefill * 1e3:8.2f} ms, decode step {decode * 1e3:8.2f} ms")
    print(f"  the first round took {first_round['as it is']:.1f} s as it is, {first_round['compiled']:.1f} s compiled")


if __name__ == "__main__":
    main()
