"""Small steps captured once a kind is met often, and replayed from then on.

Of a small model's step a half and more is Python: modules, hooks, views. A replay makes the kernels' calls alone, over
the same weights, the same cache, and whichever adapters the step has: on a CPU as `cpu_replays.py` has it, on a GPU as
a CUDA graph (`cuda_replays.py`).
Until a kind has a graph of its own, one of a few more tokens does as well, the rest of them padding: drafts make steps
of all sizes.
A graph's first replay is checked against the model itself, with adapters and without, where one graph serves both; if
they differ, or a model cannot be captured, every step goes through the model as before.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

from torch import Tensor

from loraplex.engines.native.attention import PagedAttention
from loraplex.engines.native.capture import NotCapturable
from loraplex.engines.native.lora import Owners
from loraplex.engines.native.replays import Inputs, Recording, Replays, Step

MOST_GRAPHS = 64  # a few megabytes each
FEWEST_STEPS, MOST_STEPS = 3, 16  # of a kind, after which it is captured: see `_Worth`
MOST_PADDING = 1 / 2  # of a step's tokens, in a graph that was captured for more
_BORROWED_STEPS = 8  # times as many, where a graph for more tokens serves: most that a replay saves is saved already

# (token ids, positions, numbers of the tokens that are sampled) -> their logits.
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]

_log = logging.getLogger("loraplex.engine")


class RepeatableLora(Protocol):
    """The LoRA layers, as far as steps are replayed."""

    def may_repeat(self, owners: Sequence[Owners]) -> bool: ...

    def begin_repeated(self, owners: Sequence[Owners], sampled: Sequence[int], num_tokens: int) -> Hashable: ...


class _Kind(NamedTuple):
    """What steps have in common that one graph computes."""

    num_tokens: int  # padding included
    num_sampled: int
    adapters: Hashable  # what LoRA's layers say of them

    @property
    def samples_all(self) -> bool:
        return self.num_sampled == self.num_tokens

    def serves(self, other: _Kind) -> bool:
        """Whether it is the same as another with more padding."""
        sampled_alike = self.samples_all if other.samples_all else self.num_sampled == other.num_sampled
        return self.num_tokens > other.num_tokens and sampled_alike and self.adapters == other.adapters


@dataclass(slots=True)
class _Captured:
    inputs: Inputs
    graph: Recording
    seconds: float  # that it took
    checked: set[bool] = field(default_factory=set)  # on steps without adapters, on steps with some


class _Worth:
    """After how many steps of a kind it pays to capture it: when they took as much too long as a capture takes.

    A small model's is earned by the next few steps, a large one's, whose Python is little beside its weights, later.
    """

    def __init__(self) -> None:
        self._taken = self._saved = 0.0

    def learn(self, taken: float, saved: float) -> None:
        """A capture took so many seconds, its check included; a replay takes so many less than the model."""
        self._taken += taken
        self._saved += saved

    @property
    def num_steps(self) -> int:
        if not self._taken:
            return FEWEST_STEPS
        if self._saved * MOST_STEPS <= self._taken:  # also where replays have saved nothing
            return MOST_STEPS
        return max(round(self._taken / self._saved), FEWEST_STEPS)


class StepGraphs:
    """The graphs of one model; `is_on` until one turns out not to be possible."""

    def __init__(self, forward: Forward, attention: PagedAttention, lora: RepeatableLora, replays: Replays) -> None:
        self.is_on = True
        self.is_settled = True  # whether the last step was neither captured nor checked: those take longer
        self._forward = forward
        self._attention = attention
        self._lora = lora
        self._replays = replays
        self._graphs: dict[_Kind, _Captured] = {}  # the one that was used last is the last
        self._num_steps: Counter[_Kind] = Counter()  # before each was captured
        self._worth = _Worth()

    def takes(self, step: Step) -> bool:
        """Whether it may be replayed: a small step, whose adapters do nothing but LoRA, one a token."""
        return self.is_on and self._replays.takes(step) and self._lora.may_repeat(step.owners)

    def logits(self, step: Step) -> Tensor:
        """Of a step that is taken, behind the tokens that are sampled. Shape [N, V]; gone with the next step."""
        kind = self._begin(step, self._replays.padded(step.num_tokens, is_even=step.is_even))
        if kind not in self._graphs and (num_tokens := self._borrowed(kind)):
            self._num_steps[kind] += 1
            kind = self._begin(step, num_tokens)
        captured = self._graphs.get(kind)
        inputs = captured.inputs if captured else self._replays.inputs(kind.num_tokens, kind.num_sampled)
        inputs.become(step)
        logits = self._replay(captured, kind, any(step.owners)) if captured else self._compute(inputs, kind)
        return logits[: len(step.sampled)]

    def _begin(self, step: Step, num_tokens: int) -> _Kind:
        """Set LoRA's part of a step that is padded to so many tokens."""
        num_sampled = num_tokens if step.samples_all else len(step.sampled)
        return _Kind(num_tokens, num_sampled, self._lora.begin_repeated(step.owners, step.sampled, num_tokens))

    def _borrowed(self, kind: _Kind) -> int:
        """Tokens of the least captured kind that serves this one too; 0: none does, or it is worth one of its own."""
        if self._num_steps[kind] >= _BORROWED_STEPS * self._worth.num_steps:
            return 0
        most = kind.num_tokens * (1 + MOST_PADDING)
        alike = (other.num_tokens for other in self._graphs if other.serves(kind))
        return min((num_tokens for num_tokens in alike if num_tokens <= most), default=0)

    def _compute(self, inputs: Inputs, kind: _Kind) -> Tensor:
        self._num_steps[kind] += 1
        self.is_settled = self._num_steps[kind] <= self._worth.num_steps
        if self.is_settled:
            return self._through_model(inputs)
        began = time.perf_counter()
        try:
            logits, graph = self._replays.record(partial(self._through_model, inputs))
        except NotCapturable as error:
            self._give_up(str(error))
            return self._through_model(inputs)
        self._graphs[kind] = _Captured(inputs, graph, seconds=time.perf_counter() - began)
        if len(self._graphs) > MOST_GRAPHS:
            longest_unused = next(iter(self._graphs))
            del self._graphs[longest_unused], self._num_steps[longest_unused]
        return logits

    def _replay(self, captured: _Captured, kind: _Kind, has_adapters: bool) -> Tensor:
        self._graphs[kind] = self._graphs.pop(kind)
        self.is_settled = has_adapters in captured.checked
        if self.is_settled:
            return captured.graph.replay()
        began = time.perf_counter()
        logits = self._through_model(captured.inputs)
        computed = time.perf_counter()
        replayed = captured.graph.replay()
        if not captured.checked:
            # what recording took beyond a step, and this step takes beyond a replay, together is what recording took
            saved = (computed - began) - (time.perf_counter() - computed)
            self._worth.learn(captured.seconds, saved)
        captured.checked.add(has_adapters)
        if not self._replays.agree(replayed, logits):
            self._give_up("a replay gave other numbers than the model")
        return logits

    def _through_model(self, inputs: Inputs) -> Tensor:
        self._attention.begin(inputs.attention)
        return self._forward(inputs.token_ids, inputs.positions, inputs.sampled)

    def _give_up(self, why: str) -> None:
        self.is_on = False
        self._graphs.clear()
        _log.info("steps are not replayed, which would be faster: %s", why)
