"""LoRA beside the linear layers of a transformers model, for whichever adapters the step's tokens belong to.

Each linear layer's `forward` is wrapped once, at start; the layer itself, its weight (quantised or not) and its
name stay as they are. The wrapper asks the current step what to add. Long runs of one adapter's tokens take two GEMMs
each, or one call for all of them where the CPU has tile registers. All other tokens of a step together take one call
that reads the adapters where they lie in the arena; where that call was not built, two GEMMs over the active adapters'
matrices, stacked (one copy a set of adapters) and masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loraplex.engines.adapters.arena import Arena
from loraplex.engines.adapters.peft import BaseModule
from loraplex.engines.native.active_adapters import ActiveAdapters, KnownRows, Layout
from loraplex.engines.native.compiled_ops import followed_by
from loraplex.kernels.lora.decode import CurrentStep, DecodeStep, add_decode, has_tiles, is_available
from loraplex.kernels.lora.grouped import add_masked, add_run, owner_mask

# Products with A and B of a run of tokens, from which on a pair of GEMMs beats the decode kernel: a pair costs some
# 80 µs however short the run. What counts is a layer of average width, and this rank.
_LONG_RUN = 2**22
_TYPICAL_RANK = 24
_LONG_RUN_IN_TILES = 8  # tokens, from which on tiles beat the form for few (`bench/kernel_table.py --ops lora/decode`)
# Without the decode kernel: tokens of a step beyond which a GEMM pair for each run beats one masked pair over all rows.
MASKED_MAX_TOKENS = 64
# The adapters of one token, with their weights: none for the base, several for a composition.
Owners = tuple[tuple[str, float], ...]
Parts = tuple[tuple[int, float], ...]  # the same by the adapters' positions among the active ones
_MAX_KNOWN_ROWS = 4096  # adapters; a few kilobytes each
_MAX_STACKS = 2  # each may be a copy of its adapters' matrices
# Elements that a step may copy into stacks, some 2 ms; the modules that have none yet are computed run by run.
_MAX_STACKED = 2**21


class TokenGroups:
    """Which adapter each token of one view of the step belongs to: all tokens, or those that are sampled."""

    def __init__(
        self,
        parts: Sequence[Parts],
        active: ActiveAdapters,
        device: torch.device,
        *,
        long_run: int | None = None,
        in_tiles: bool = False,
        one_by_one: bool = False,
    ) -> None:
        """`long_run`: tokens from which on a run of one adapter's tokens is computed as such; None: never.

        `in_tiles`: the long runs share one call, instead of a pair of GEMMs for each.
        `one_by_one`: nothing of one token may depend on which others there are.
        """
        self.one_by_one = one_by_one
        self._long_run = long_run
        self._in_tiles = in_tiles
        self.is_composed = any(len(some) > 1 or (some and some[0][1] != 1.0) for some in set(parts))
        self.owners = [some[0][0] if some else -1 for some in parts]  # the only ones, unless it is composed
        self.parts = parts
        self._active = active
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
    def long_runs(self) -> list[tuple[int, int, int]]:
        if self._long_run is None or self.one_by_one:
            return []
        return [(begin, end, owner) for begin, end, owner in self.runs if end - begin >= self._long_run]

    @cached_property
    def calls(self) -> list[DecodeStep]:
        """The tokens outside of long runs; and those of the long runs, where there are tiles for them."""
        owners, long = list(self.owners), [-1] * len(self.owners)
        for begin, end, owner in self.long_runs:
            owners[begin:end] = [-1] * (end - begin)
            long[begin:end] = [owner] * (end - begin)
        kinds = [(owners, False), (long, True)] if self._in_tiles else [(owners, False)]
        return [
            DecodeStep(self._active.table, some, in_tiles=in_tiles)
            for some, in_tiles in kinds
            if max(some, default=-1) >= 0
        ]

    @property
    def gemm_runs(self) -> list[tuple[int, int, int]]:
        """The long runs that `calls` leave out."""
        return [] if self._in_tiles else self.long_runs

    @cached_property
    def taken_apart(self) -> list[DecodeStep]:
        """Compositions: steps of one adapter a token at most, which together are all of them."""
        deepest = max(map(len, self.parts), default=0)
        apart = [[some[depth] if depth < len(some) else (-1, 0.0) for some in self.parts] for depth in range(deepest)]
        return [DecodeStep(self._active.table, *zip(*parts, strict=True)) for parts in apart]

    @cached_property
    def stretches(self) -> list[tuple[int, int, Parts]]:
        """(begin, end, parts) of the longest stretches of tokens with the same parts; base tokens are left out."""
        stretches: list[tuple[int, int, Parts]] = []
        for token, parts in enumerate(self.parts):
            if stretches and stretches[-1][1] == token and stretches[-1][2] == parts:
                stretches[-1] = (stretches[-1][0], token + 1, parts)
            elif parts:
                stretches.append((token, token + 1, parts))
        return stretches

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


class _Repeated(NamedTuple):
    """What LoRA's part of a repeated step depends on."""

    active: ActiveAdapters
    positions: list[int]
    weights: list[float]
    sampled: list[int]
    num_threads: int


class LoraLayers:
    """The wrapped layers of one model and the step they work on."""

    def __init__(self, arena: Arena, *, uses_gemms: bool = True) -> None:
        """`uses_gemms`: for long runs of one adapter's tokens; without the decode kernel always."""
        self.step: LoraStep | None = None
        self._arena = arena
        self._uses_gemms = uses_gemms
        self._has_kernel = is_available(arena.dtype, arena.device)
        self._has_tiles = has_tiles(arena.dtype, arena.device)
        self._modules: list[BaseModule] = []
        self._known_rows: dict[str, KnownRows] = {}
        self._recent: list[ActiveAdapters] = []
        self._left_to_stack = 0
        self._repeated, self._repeated_sampled = CurrentStep(), CurrentStep()
        self._latest_repeated: _Repeated | None = None
        self._repeats = False

    def wrap(self, layer: nn.Module, module: BaseModule, *, behind_selection: bool) -> None:
        """Replace the layer's `forward` by one that adds the step's adapters. To be called in the order of `index`."""
        bias = getattr(layer, "bias", None)
        index = module.index
        assert index == len(self._modules)
        self._modules.append(module)

        def add(y: Tensor, x: Tensor) -> None:
            step = self.step
            if self._repeats:
                tokens = self._repeated_sampled if behind_selection else self._repeated
                add_decode(y, x.contiguous(), index, tokens)
            elif step is not None and index in step.active.touched:
                groups = step.sampled if behind_selection else step.tokens
                self._add(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), index, step.active, groups, bias)

        layer.forward = followed_by(layer.forward, add)

    @cached_property
    def _long_run(self) -> int | None:
        if self._has_tiles:
            return _LONG_RUN_IN_TILES
        if not self._uses_gemms or not self._modules:
            return None
        width = sum(module.in_features + module.out_features for module in self._modules) / len(self._modules)
        return math.ceil(_LONG_RUN / (_TYPICAL_RANK * width))

    def begin(
        self, owners: Sequence[Owners], sampled: Sequence[int], device: torch.device, *, one_by_one: bool = False
    ) -> None:
        """Set the step. `owners[t]` are token t's adapters; `sampled` are the token numbers behind the selection.

        `one_by_one`: what a token gets does not depend, not in its last bit, on the others.
        """
        self._left_to_stack = _MAX_STACKED
        self._repeats = False
        kinds = set(owners)
        names = tuple(sorted({adapter_id for some in kinds for adapter_id, _ in some}))
        if not names:
            self.step = None
            return
        active = self._active(names)
        known = {some: tuple((active.positions[name], weight) for name, weight in some) for some in kinds}
        parts = [known[some] for some in owners]
        groups = partial(
            TokenGroups, active=active, device=device,
            long_run=self._long_run, in_tiles=self._has_tiles, one_by_one=one_by_one,
        )  # fmt: skip
        self.step = LoraStep(active, tokens=groups(parts), sampled=groups([parts[token] for token in sampled]))

    def may_repeat(self, owners: Sequence[Owners]) -> bool:
        """Whether `begin_repeated` can set this step: at most one adapter a token, which does nothing but add B·A."""
        kinds = set(owners)
        return (
            self._has_kernel
            and all(len(some) <= 1 for some in kinds)
            and all(self._arena.plan(adapter_id).why_alone is None for some in kinds for adapter_id, _ in some)
        )

    def begin_repeated(self, owners: Sequence[Owners], sampled: Sequence[int], num_tokens: int) -> None:
        """Set a step whose layers make the same calls, over the same memory, whichever adapters its tokens have.

        A step without adapters makes them too, and each returns at once. `num_tokens`: padding included.
        """
        self.step = None
        self._repeats = True
        names = tuple(sorted({adapter_id for some in owners for adapter_id, _ in some}))
        if not names:
            self._repeat(None)
            return
        active = self._active(names)
        positions = [active.positions[some[0][0]] if some else -1 for some in owners]
        weights = [some[0][1] if some else 0.0 for some in owners]
        self._repeat(_Repeated(active, positions, weights, [*sampled], torch.get_num_threads()))

    def _repeat(self, step: _Repeated | None) -> None:
        """Most steps are of the same tokens' owners as the one before. None: there are no adapters."""
        if step == self._latest_repeated:
            return
        self._latest_repeated = step
        if step is None:
            self._repeated.rest()
            self._repeated_sampled.rest()
            return
        tokens = DecodeStep(step.active.table, step.positions, step.weights)
        self._repeated.become(tokens)
        if step.sampled != [*range(len(step.positions))]:
            tokens = DecodeStep(
                step.active.table,
                [step.positions[token] for token in step.sampled],
                [step.weights[token] for token in step.sampled],
            )
        self._repeated_sampled.become(tokens)

    def _active(self, adapter_ids: tuple[str, ...]) -> ActiveAdapters:
        """Recent sets are kept: while their adapters come and go, little is made anew."""
        wanted = set(adapter_ids)
        active = next((recent for recent in self._recent if recent.serves(wanted)), None)
        if active is None:
            if len(self._known_rows) > _MAX_KNOWN_ROWS:
                self._known_rows.clear()
            active = ActiveAdapters(adapter_ids, self._arena, self._modules, self._known_rows)
        else:
            self._recent.remove(active)
        self._recent = [active, *self._recent[: _MAX_STACKS - 1]]
        return active

    def _may_stack(self, index: int, active: ActiveAdapters) -> bool:
        """Whether the module has its stack, or may have it made in this step; the first one may be any size."""
        wanted = active.num_to_stack(index)
        if wanted > self._left_to_stack < _MAX_STACKED:
            return False
        self._left_to_stack -= wanted
        return True

    def _add(
        self, y: Tensor, x: Tensor, index: int, active: ActiveAdapters, groups: TokenGroups, bias: Tensor | None
    ) -> None:
        """y: Shape [T, out], changed in place. x: Shape [T, in]."""
        if groups.one_by_one and not self._has_kernel:
            _add_one_by_one(y, x.contiguous(), index, active, groups, bias)
            return
        gains = active.gains(index)
        left_out = None if gains is None or bias is None else gains.bias(bias, groups.owner)
        if left_out is not None:
            y.sub_(left_out)
        if groups.is_composed and self._has_kernel:
            x = x.contiguous()
            for part in groups.taken_apart:
                add_decode(y, x, index, part)
        elif groups.is_composed:
            _add_composed(y, x, index, active, groups)
        elif self._has_kernel or groups.prefers_runs or not self._may_stack(index, active):
            for begin, end, owner in groups.gemm_runs if self._has_kernel else groups.runs:
                if (factors := active.factors(index, owner)) is not None:
                    add_run(y[begin:end], x[begin:end], *factors)
            for call in groups.calls if self._has_kernel else []:
                add_decode(y, x.contiguous(), index, call)
        else:
            stack = active.stack(index)
            add_masked(y, x, stack.a, stack.b, groups.mask(stack.layout))
        if gains is not None:
            y.mul_(gains.factors[groups.owner])
        if left_out is not None:
            y.add_(left_out)


def _add_one_by_one(
    y: Tensor, x: Tensor, index: int, active: ActiveAdapters, groups: TokenGroups, bias: Tensor | None
) -> None:
    """Each token in calls of its own, whose shapes and memory alignments never vary: GEMMs depend on company."""
    for token, parts in enumerate(groups.parts):
        gain = active.gain(index, parts[0][0]) if len(parts) == 1 else None
        row = y[token]
        if gain is not None and bias is not None:
            row.sub_(bias)
        for position, weight in parts:
            if (factors := active.factors(index, position)) is not None:
                a, b, scale = factors
                row.add_((x[token : token + 1].clone() @ a.t() @ b).mul_(scale * weight)[0])
        if gain is not None:
            row.mul_(gain)
            if bias is not None:
                row.add_(bias)


def _add_composed(y: Tensor, x: Tensor, index: int, active: ActiveAdapters, groups: TokenGroups) -> None:
    """Stretch by stretch: y += Σ w · scale · B·A·x."""
    for begin, end, parts in groups.stretches:
        for position, weight in parts:
            if (factors := active.factors(index, position)) is not None:
                a, b, scale = factors
                add_run(y[begin:end], x[begin:end], a, b, scale * weight)
