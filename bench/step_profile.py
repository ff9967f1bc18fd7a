"""Where a replayed decoding step goes: scheduling, sampling, and every kind of kernel call of its graph.

    python bench/step_profile.py --shape 135m --ranks 8,16,32,64 --requests 8

Decodes as `mixed.py` does, on the base and with the adapters dealt out in turn, until the step is captured, then makes
the graph's calls one by one in their order, `--passes` times, each timed: weights come from where they come from in a
step.
The engine alone, nothing drafted. Prints medians in milliseconds.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mixed import decode, make_adapters, make_core, options_of

from loraplex.engines.native.core import EngineCore
from loraplex.kernels.calls import Calls


class Phases:
    """Milliseconds of whole steps of one size and of their parts."""

    def __init__(self, core: EngineCore, num_tokens: int) -> None:
        self.found: defaultdict[str, list[float]] = defaultdict(list)
        self._num_tokens, self._now = num_tokens, dict[str, float]()
        runner: Any = core._machine.runner
        runner.logits = self._timed("forward", runner.logits)
        runner.run = self._timed("run", runner.run)
        self._step, self._core = core.step, core
        core.step = self._whole_step  # type: ignore[method-assign]

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(batch: Any) -> Any:
            began = time.perf_counter()
            found = function(batch)
            self._now[name] = (time.perf_counter() - began) * 1e3
            self._now["tokens"] = batch.num_tokens
            return found

        return timed

    def _whole_step(self) -> Any:
        self._now.clear()
        began = time.perf_counter()
        found = self._step()
        whole, now = (time.perf_counter() - began) * 1e3, self._now
        if now.get("tokens") == self._num_tokens:
            self.found["step"].append(whole)
            self.found["forward"].append(now["forward"])
            self.found["sampling"].append(now["run"] - now["forward"])
            self.found["scheduling and emissions"].append(whole - now["run"])
        return found


def calls_of(graph: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each call of a captured step with the name of its kind, in their order."""
    for step in graph._steps:
        if isinstance(step, Calls):
            size = ctypes.sizeof(step._calls) // len(step._kept)
            for number, (kernel, _) in enumerate(step._kept):
                address = step._address + number * size
                yield kernel.run.__name__, lambda run=step._run, address=address: run(address, 1)  # type: ignore[misc]
        else:
            yield f"torch {getattr(step, 'func', step)}", step


@torch.inference_mode()
def profile(graph: Any, passes: int) -> dict[str, tuple[int, float]]:
    """Kind of call -> how many a step has, and the milliseconds of all of them."""
    calls = list(calls_of(graph))
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(passes):
        for times, (_, call) in zip(seconds, calls, strict=True):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    counts, totals = Counter(name for name, _ in calls), Counter[str]()
    for (name, _), times in zip(calls, seconds, strict=True):
        totals[name] += statistics.median(times) * 1e3  # type: ignore[assignment]
    return {name: (counts[name], total) for name, total in totals.most_common()}


def main() -> None:
    parser = options_of(__doc__)
    parser.set_defaults(rounds=4)  # in which steps are captured, checked and replayed
    parser.add_argument("--passes", type=int, default=30)
    options = parser.parse_args()
    adapters, core = make_adapters(options), make_core(options)
    phases = Phases(core, options.requests)
    for tag, who in (("base", [None]), ("mixed", adapters)):
        for number in range(options.rounds):
            phases.found.clear()
            decode(core, list(who), options, f"{tag}{number}")
        print(f"{options.shape}, {tag}, {options.requests} requests, {torch.get_num_threads()} threads")
        for name, times in phases.found.items():
            print(f"  {name:40} {statistics.median(times):8.2f} ms")
        graphs = core._machine.runner.graphs
        if graphs is None or not graphs._graphs:
            print("  no step was captured")
            continue
        latest = [*graphs._graphs.values()][-1]
        for name, (count, total) in list(profile(latest.graph, options.passes).items())[:8]:
            print(f"    {name:38} {total:8.2f} ms, {count} calls")


if __name__ == "__main__":
    main()
