"""What is captured and replayed of a step on a CPU: the kernels' calls, over inputs that keep their place.

Steps of one token a sequence have as many tokens as there are sequences; others are padded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loraplex.engines.native.attention import AttentionStep, Decodes
from loraplex.engines.native.capture import Capture, Graph, Pool
from loraplex.engines.native.replays import Step
from loraplex.kernels.attention.cpu_decode import DecodeRows

MOST_TOKENS = 64  # beyond which computing takes far longer than Python, and a graph's memory grows


class CpuInputs:
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

    def become(self, step: Step) -> None:
        """Be this step. It samples as many tokens as told at first, or all."""
        attention, count = step.attention, step.num_tokens
        assert isinstance(attention, AttentionStep)
        assert attention.decodes is not None
        padding = [0] * (self.token_ids.shape[1] - count)
        self.token_ids.numpy()[0] = [*step.token_ids, *padding]
        self.positions.numpy()[0] = [*step.positions, *padding]
        slots, lengths = self._slots.numpy(), self._lengths.numpy()  # whose assignments cost less than torch's
        slots[:count], slots[count:] = attention.slots.numpy(), self._spare_slot
        lengths[:count], lengths[count:] = attention.decodes.lengths.numpy(), 0
        self._decodes.become(attention.decodes.slots, self._lengths)
        if not step.samples_all:
            self.sampled.numpy()[:] = step.sampled


class CpuReplays:
    """Implements `Replays`."""

    def __init__(self, spare_slot: int) -> None:
        """`spare_slot`: a row of the cache that nobody reads."""
        self._spare_slot = spare_slot
        self._pool = Pool()

    def takes(self, step: Step) -> bool:
        """Whether it is a small step, attended token by token."""
        attention = step.attention
        return isinstance(attention, AttentionStep) and not attention.prefills and step.num_tokens <= MOST_TOKENS

    def padded(self, num_tokens: int, *, is_even: bool) -> int:
        """Drafts and prompts of all lengths share some graphs; many steps of decodes alone have as many tokens.

        Beyond some eight a token takes a twentieth of the step where a CPU has no tile registers, a row of padding too.
        """
        step = 1 if is_even or num_tokens <= 16 else 2 if num_tokens <= 32 else 4
        return -(-num_tokens // step) * step

    def inputs(self, num_tokens: int, num_sampled: int) -> CpuInputs:
        return CpuInputs(num_tokens, num_sampled, self._spare_slot)

    def record(self, forward: Callable[[], Tensor]) -> tuple[Tensor, Graph]:
        """What it gives, and the graph of what it does. Raises NotCapturable."""
        capture = Capture()
        with capture.capturing():
            logits = forward()
        return logits, capture.graph(logits, self._pool)

    def agree(self, replayed: Tensor, computed: Tensor) -> bool:
        """To the last bit, also where they are no numbers."""
        return torch.equal(replayed.contiguous().view(torch.uint8), computed.contiguous().view(torch.uint8))
