"""What a step that is captured and replayed needs of the device that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from loraplex.engines.native.attention import AttentionStep
from loraplex.engines.native.device_attention import KernelStep


class Inputs(Protocol):
    """Of steps of at most so many tokens: tensors that keep their place. What they leave over is padding."""

    token_ids: Tensor  # Shape [1, T]
    positions: Tensor  # Shape [1, T]
    sampled: Tensor  # Shape [N]

    @property
    def attention(self) -> AttentionStep | KernelStep: ...

    def become(
        self,
        step: AttentionStep | KernelStep,
        token_ids: Sequence[int],
        positions: Sequence[int],
        sampled: Sequence[int],
    ) -> None:
        """Be this step. `sampled`: as many as told at first, or all tokens."""


class Recording(Protocol):
    """A forward pass that was captured, over its inputs."""

    def replay(self) -> Tensor:
        """The logits for what the inputs hold now, in memory that a later replay may write again."""


class Replays(Protocol):
    """What is particular to one kind of device."""

    def takes(self, step: AttentionStep | KernelStep, num_tokens: int, num_sampled: int) -> bool:
        """Whether such a step may be replayed."""

    def padded(self, num_tokens: int, *, is_even: bool) -> int:
        """As many or a few more. `is_even`: one token a sequence."""

    def inputs(self, num_tokens: int, num_sampled: int) -> Inputs: ...

    def record(self, forward: Callable[[], Tensor]) -> tuple[Tensor, Recording]:
        """The logits that it gives, and how to have them again. Raises NotCapturable."""

    def agree(self, replayed: Tensor, computed: Tensor) -> bool:
        """Whether a replay gave what the model gives."""
