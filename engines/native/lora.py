"""LoRA beside the linear layers of a transformers model, for whichever adapters the step's tokens belong to.

Each linear layer's `forward` is wrapped once, at start; the layer itself, its weight (quantised or not) and its
name stay as they are. The wrapper asks the current step what to add. On the CPU the active adapters' matrices are
kept stacked (one copy, made when the set of active adapters changes), so that a step is two GEMMs a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from loraplex.engines.adapters.arena import Arena
from loraplex.engines.adapters.peft import BaseModule, ModuleEntry
from loraplex.kernels.lora.grouped import add_masked, add_runs, owner_mask

# Tokens of a step beyond which a GEMM pair for each run of tokens beats one masked pair over all adapters' rows.
MASKED_MAX_TOKENS = 64
_MAX_STACKS = 2  # each is a copy of its adapters' matrices


@dataclass(frozen=True, slots=True)
class Layout:
    """How adapters' rows lie in a stack: G adapters, R rows. Modules that share a layout share a step's mask."""

    first: tuple[int, ...]
    scale: tuple[float, ...]
    row_owner: Tensor
    row_scale: Tensor


@dataclass(frozen=True, slots=True)
class Stack:
    """One module's matrices of all active adapters. a: Shape [R, in]. b: Shape [R, out]. gains: Shape [G + 1, out]."""

    layout: Layout
    a: Tensor
    b: Tensor
    gains: Tensor | None


class ActiveAdapters:
    """The stacks of one set of adapters, made module by module when first asked for."""

    def __init__(self, adapter_ids: Sequence[str], arena: Arena) -> None:
        self.positions = {adapter_id: position for position, adapter_id in enumerate(adapter_ids)}
        self._entries = [arena.plan(adapter_id).entries for adapter_id in adapter_ids]
        self._ranks = [max(entry.rank for entry in entries.values()) for entries in self._entries]
        self._flats = [arena.flat(adapter_id) for adapter_id in adapter_ids]
        self._layouts: dict[tuple[tuple[int, ...], tuple[float, ...]], Layout] = {}
        self._stacks = {index: self._stack(index) for index in sorted({i for e in self._entries for i in e})}

    def serves(self, adapter_ids: Set[str]) -> bool:
        """Whether a step of just these adapters may use the stacks: all are in, at no more than twice their rows."""
        if not adapter_ids <= self.positions.keys():
            return False
        return sum(self._ranks) <= 2 * sum(self._ranks[self.positions[adapter_id]] for adapter_id in adapter_ids)

    def stack(self, index: int) -> Stack | None:
        """None where no active adapter touches the module."""
        return self._stacks.get(index)

    def _stack(self, index: int) -> Stack:
        present = [(entries[index], flat) for entries, flat in zip(self._entries, self._flats, strict=True)
                   if index in entries]  # fmt: skip
        gains = None
        if any(entry.gain is not None for entry, _ in present):
            gains = torch.ones(len(self._entries) + 1, present[0][0].module.out_features).to(present[0][1])
            for position, (entries, flat) in enumerate(zip(self._entries, self._flats, strict=True)):
                if index in entries and (gain := entries[index].gain_of(flat)) is not None:
                    gains[position] = gain
        return Stack(
            layout=self._layout([entries.get(index) for entries in self._entries], like=present[0][1]),
            a=torch.cat([entry.a_of(flat) for entry, flat in present]),
            b=torch.cat([entry.b_of(flat) for entry, flat in present]),
            gains=gains,
        )

    def _layout(self, entries: Sequence[ModuleEntry | None], like: Tensor) -> Layout:
        ranks = tuple(entry.rank if entry else 0 for entry in entries)
        scale = tuple(entry.scale if entry else 0.0 for entry in entries)
        if (ranks, scale) not in self._layouts:
            first = [0]
            for rank in ranks:
                first.append(first[-1] + rank)
            repeats = torch.tensor(ranks)
            self._layouts[ranks, scale] = Layout(
                first=tuple(first),
                scale=scale,
                row_owner=torch.arange(len(ranks)).repeat_interleave(repeats).to(like.device),
                row_scale=torch.tensor(scale).repeat_interleave(repeats).to(like),
            )
        return self._layouts[ranks, scale]


class TokenGroups:
    """Which adapter each token of one view of the step belongs to: all tokens, or those that are sampled."""

    def __init__(self, owners: Sequence[int], device: torch.device) -> None:
        self.owners = owners
        self._device = device
        self._masks: dict[int, Tensor] = {}

    @cached_property
    def owner(self) -> Tensor:
        return torch.tensor(self.owners, device=self._device)

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """(begin, end, adapter) of the longest stretches of one adapter's tokens; base tokens are left out."""
        runs: list[tuple[int, int, int]] = []
        for token, owner in enumerate(self.owners):
            if runs and runs[-1][1] == token and runs[-1][2] == owner:
                runs[-1] = (runs[-1][0], token + 1, owner)
            elif owner >= 0:
                runs.append((token, token + 1, owner))
        return runs

    @cached_property
    def prefers_runs(self) -> bool:
        return len(self.runs) == 1 or len(self.owners) > MASKED_MAX_TOKENS

    def mask(self, layout: Layout) -> Tensor:
        """Shape [T, R]; made once for each layout."""
        key = id(layout)
        if key not in self._masks:
            self._masks[key] = owner_mask(self.owner, layout.row_owner, layout.row_scale)
        return self._masks[key]


@dataclass(frozen=True, slots=True)
class LoraStep:
    """What one step adds. `sampled` is the view of the layers behind the selection of tokens (lm_head)."""

    active: ActiveAdapters
    tokens: TokenGroups
    sampled: TokenGroups


class LoraLayers:
    """The wrapped layers of one model and the step they work on."""

    def __init__(self, arena: Arena) -> None:
        self.step: LoraStep | None = None
        self._arena = arena
        self._recent: list[ActiveAdapters] = []

    def wrap(self, layer: nn.Module, module: BaseModule, *, behind_selection: bool) -> None:
        """Replace the layer's `forward` by one that adds the step's adapters."""
        forward: Callable[[Tensor], Tensor] = layer.forward
        bias = getattr(layer, "bias", None)

        def forward_with_lora(x: Tensor) -> Tensor:
            y = forward(x)
            step = self.step
            if step is None or (stack := step.active.stack(module.index)) is None:
                return y
            _add(y, x, stack, step.sampled if behind_selection else step.tokens, bias)
            return y

        layer.forward = forward_with_lora

    def begin(self, adapter_ids: Sequence[str | None], sampled: Sequence[int], device: torch.device) -> None:
        """Set the step. `adapter_ids[t]` owns token t; `sampled` are the token numbers behind the selection."""
        names = tuple(sorted({adapter_id for adapter_id in adapter_ids if adapter_id is not None}))
        if not names:
            self.step = None
            return
        active = self._active(names)
        owners = [active.positions[adapter_id] if adapter_id else -1 for adapter_id in adapter_ids]
        self.step = LoraStep(
            active=active,
            tokens=TokenGroups(owners, device),
            sampled=TokenGroups([owners[token] for token in sampled], device),
        )

    def _active(self, adapter_ids: tuple[str, ...]) -> ActiveAdapters:
        """Recent stacks are kept: they are copies named by content, so a move in the arena does not stale them.

        An adapter whose last request ended stays in the stack, multiplied by zero, until half the rows are such.
        """
        wanted = set(adapter_ids)
        active = next((recent for recent in self._recent if recent.serves(wanted)), None)
        if active is None:
            active = ActiveAdapters(adapter_ids, self._arena)
        else:
            self._recent.remove(active)
        self._recent = [active, *self._recent[: _MAX_STACKS - 1]]
        return active


def _add(y: Tensor, x: Tensor, stack: Stack, groups: TokenGroups, bias: Tensor | None) -> None:
    """y: Shape [1, T, out] or [T, out], changed in place. x: the same with in."""
    y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    if stack.gains is not None and bias is not None:
        y.sub_(bias)
    if groups.prefers_runs:
        add_runs(y, x, stack.a, stack.b, groups.runs, stack.layout.first, stack.layout.scale)
    else:
        add_masked(y, x, stack.a, stack.b, groups.mask(stack.layout))
    if stack.gains is not None:
        y.mul_(stack.gains[groups.owner])
        if bias is not None:
            y.add_(bias)
