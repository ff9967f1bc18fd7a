"""What a step that is captured and replayed needs of the device that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from loraplex.engines.native.attention import AttentionStep
from loraplex.engines.native.device_attention import KernelStep
from loraplex.engines.native.lora import Owners


@dataclass(frozen=True, slots=True)
class Step:
    """The tokens of one step, packed, and what attention and LoRA need to know of them.

    owners: each token's adapters. sampled: the numbers of those behind which logits are wanted, all of them or fewer.
    is_even: whether there is one token a sequence.
    """

    attention: AttentionStep | KernelStep
    token_ids: Sequence[int]
    positions: Sequence[int]
    owners: Sequence[Owners]
    sampled: Sequence[int]
    is_even: bool

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def samples_all(self) -> bool:
        return len(self.sampled) == len(self.token_ids)


class Inputs(Protocol):
    """Of steps of at most so many tokens: tensors that keep their place. What they leave over is padding."""

    token_ids: Tensor  # Shape [1, T]
    positions: Tensor  # Shape [1, T]
    sampled: Tensor  # Shape [N]

    @property
    def attention(self) -> AttentionStep | KernelStep: ...

    def become(self, step: Step) -> None:
        """Be this step. It samples as many tokens as told at first, or all."""


class Recording(Protocol):
    """A forward pass that was captured, over its inputs."""

    def replay(self) -> Tensor:
        """The logits for what the inputs hold now, in memory that a later replay may write again."""


class Replays(Protocol):
    """What is particular to one kind of device."""

    def takes(self, step: Step) -> bool:
        """Whether such a step may be replayed."""

    def padded(self, num_tokens: int, *, is_even: bool) -> int:
        """As many or a few more. `is_even`: one token a sequence."""

    def inputs(self, num_tokens: int, num_sampled: int) -> Inputs: ...

    def record(self, forward: Callable[[], Tensor]) -> tuple[Tensor, Recording]:
        """The logits that it gives, and how to have them again. Raises NotCapturable."""

    def agree(self, replayed: Tensor, computed: Tensor) -> bool:
        """Whether a replay gave what the model gives."""
