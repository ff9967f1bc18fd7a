"""Steps of few tokens on a CPU, captured once a kind is met often, and replayed from then on.

Of a small model's step a half and more is Python: modules, hooks, views. A replay makes the kernels' calls alone, over
the same weights, the same cache, and whichever adapters the step has.
A graph's first replay is checked against the model itself, to the last bit; where they differ, or a model cannot be
captured, every step goes through the model as before.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex.engines.native.attention import AttentionStep, Decodes, PagedAttention
from loraplex.engines.native.capture import Capture, Graph, NotCapturable, Pool
from loraplex.engines.native.lora import LoraLayers, Owners
from loraplex.kernels.attention.cpu_decode import DecodeRows
from loraplex.kernels.calls import is_available

MOST_TOKENS = 64  # beyond which computing takes far longer than Python, and a graph's memory grows
MOST_GRAPHS = 64  # a few megabytes each
WORTH = 16  # steps of a kind after which it is captured: that takes about as long as they took too long

# (token ids, positions, numbers of the tokens that are sampled) -> their logits.
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]

_log = logging.getLogger("loraplex.engine")


class _Inputs:
    """Of steps of at most so many tokens: tensors that keep their place. What they leave over is padding."""

    def __init__(self, num_tokens: int, num_sampled: int, spare_slot: int) -> None:
        """`spare_slot`: the row of the cache where padding leaves its keys and values."""
        self.sampled = torch.arange(num_sampled)
        self.token_ids = torch.zeros(1, num_tokens, dtype=torch.long)
        self.positions = torch.zeros(1, num_tokens, dtype=torch.long)
        self._spare_slot = spare_slot
        self._slots = torch.zeros(num_tokens, dtype=torch.long)
        self._lengths = torch.zeros(num_tokens, dtype=torch.long)
        looked_at = torch.zeros(num_tokens, 1, dtype=torch.long)
        self._decodes = DecodeRows(looked_at, self._lengths)
        decodes = Decodes(torch.arange(num_tokens), looked_at, self._lengths, self._decodes)
        self.attention = AttentionStep(self._slots, decodes, prefills=())

    def become(self, step: AttentionStep, token_ids: Sequence[int], positions: Sequence[int]) -> None:
        assert step.decodes is not None
        padding = [0] * (self.token_ids.shape[1] - len(token_ids))
        self.token_ids.numpy()[0] = [*token_ids, *padding]
        self.positions.numpy()[0] = [*positions, *padding]
        self._slots.fill_(self._spare_slot)[: len(token_ids)] = step.slots
        self._lengths.zero_()[: len(token_ids)] = step.decodes.lengths
        self._decodes.become(step.decodes.slots, self._lengths)

    def sample(self, rows: Sequence[int]) -> None:
        """As many as told: the tokens whose logits are wanted."""
        self.sampled.numpy()[:] = rows


class _Kind(NamedTuple):
    """What steps have in common that one graph computes."""

    num_tokens: int  # padding included
    num_sampled: int
    has_adapters: bool


@dataclass(slots=True)
class _Captured:
    inputs: _Inputs
    graph: Graph
    is_checked: bool = False


class StepGraphs:
    """The graphs of one model; `is_on` until one turns out not to be possible."""

    def __init__(self, forward: Forward, attention: PagedAttention, lora: LoraLayers, spare_slot: int) -> None:
        """`spare_slot`: a row of the cache that nobody reads."""
        self.is_on = attention.reads_in_place and is_available()
        self.is_settled = True  # whether the last step was neither captured nor checked: those take longer
        self._forward = forward
        self._attention = attention
        self._lora = lora
        self._spare_slot = spare_slot
        self._pool = Pool()
        self._graphs: dict[_Kind, _Captured] = {}  # the one that was used last is the last
        self._num_steps: Counter[_Kind] = Counter()  # before each was captured

    def takes(self, step: AttentionStep, owners: Sequence[Owners]) -> bool:
        """Whether it is a small step, attended token by token, whose adapters do nothing but LoRA, one a token."""
        return self.is_on and not step.prefills and len(owners) <= MOST_TOKENS and self._lora.may_repeat(owners)

    def logits(
        self,
        step: AttentionStep,
        token_ids: Sequence[int],
        positions: Sequence[int],
        owners: Sequence[Owners],
        sampled: Sequence[int],
        *,
        is_even: bool,
    ) -> Tensor:
        """Of a step that is taken, behind the tokens that are sampled. Shape [N, V]; gone with the next step.

        `is_even`: one token a sequence, so that many steps will have as many; others are padded.
        """
        num_tokens = len(owners) if is_even else padded(len(owners))
        samples_all = len(sampled) == len(owners)
        kind = _Kind(num_tokens, num_tokens if samples_all else len(sampled), any(owners))
        captured = self._graphs.get(kind)
        inputs = captured.inputs if captured else _Inputs(kind.num_tokens, kind.num_sampled, self._spare_slot)
        inputs.become(step, token_ids, positions)
        if not samples_all:
            inputs.sample(sampled)
        self._lora.begin_repeated(owners, sampled)
        logits = self._replay(captured, kind) if captured else self._compute(inputs, kind)
        return logits[: len(sampled)]

    def _compute(self, inputs: _Inputs, kind: _Kind) -> Tensor:
        self._num_steps[kind] += 1
        self.is_settled = self._num_steps[kind] <= WORTH
        if self.is_settled:
            return self._through_model(inputs)
        capture = Capture()
        with capture.capturing():
            logits = self._through_model(inputs)
        try:
            self._graphs[kind] = _Captured(inputs, capture.graph(logits, self._pool))
        except NotCapturable as error:
            self._give_up(str(error))
        if len(self._graphs) > MOST_GRAPHS:
            longest_unused = next(iter(self._graphs))
            del self._graphs[longest_unused], self._num_steps[longest_unused]
        return logits

    def _replay(self, captured: _Captured, kind: _Kind) -> Tensor:
        self._graphs[kind] = self._graphs.pop(kind)
        self.is_settled = captured.is_checked
        if captured.is_checked:
            return captured.graph.replay()
        logits = self._through_model(captured.inputs)
        captured.is_checked = True
        if not _same_bits(captured.graph.replay(), logits):
            self._give_up("a replay gave other numbers than the model")
        return logits

    def _through_model(self, inputs: _Inputs) -> Tensor:
        self._attention.begin(inputs.attention)
        return self._forward(inputs.token_ids, inputs.positions, inputs.sampled)

    def _give_up(self, why: str) -> None:
        self.is_on = False
        self._graphs.clear()
        _log.info("steps are not replayed, which would be faster: %s", why)


def padded(num_tokens: int) -> int:
    """As many or a few more, so that drafts and prompts of all lengths share some graphs."""
    step = 1 if num_tokens <= 8 else 4 if num_tokens <= 32 else 8
    return -(-num_tokens // step) * step


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Also where they are no numbers."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
