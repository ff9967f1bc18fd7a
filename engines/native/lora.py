"""LoRA beside the linear layers of a transformers model, for whichever adapters the step's tokens belong to.

Each linear layer's `forward` is wrapped once, at start; the layer itself, its weight (quantised or not) and its
name stay as they are. The wrapper asks the current step what to add. Long runs of one adapter's tokens take two GEMMs
each. All other tokens of a step together take one call that reads the adapters where they lie in the arena; where that
call was not built, two GEMMs over the active adapters' matrices, stacked (one copy a set of adapters) and masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from loraplex.engines.adapters.arena import Arena
from loraplex.engines.adapters.peft import AdapterPlan, BaseModule, ModuleEntry
from loraplex.kernels.lora.decode import AdapterRows, DecodeStep, DecodeTable, add_decode, is_available
from loraplex.kernels.lora.grouped import add_masked, add_run, owner_mask

# Tokens from which on a run of one adapter's tokens is a pair of GEMMs of its own.
LONG_RUN = 16
# Without the decode kernel: tokens of a step beyond which a GEMM pair for each run beats one masked pair over all rows.
MASKED_MAX_TOKENS = 64
# The adapters of one token, with their weights: none for the base, several for a composition.
Owners = tuple[tuple[str, float], ...]
Parts = tuple[tuple[int, float], ...]  # the same by the adapters' positions among the active ones
_MAX_KNOWN_ROWS = 4096  # adapters; a few kilobytes each
_MAX_STACKS = 2  # each may be a copy of its adapters' matrices
# Elements that a step may copy into stacks, some 2 ms; the modules that have none yet are computed run by run.
_MAX_STACKED = 2**21


@dataclass(frozen=True, slots=True)
class Layout:
    """How adapters' rows lie in a stack. Modules that share a layout share a step's mask. Both: Shape [R]."""

    row_owner: Tensor
    row_scale: Tensor


@dataclass(frozen=True, slots=True)
class Stack:
    """One module's matrices of all active adapters. a: Shape [R, in]. b: Shape [R, out]."""

    layout: Layout
    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class _KnownRows:
    plan: AdapterPlan
    rows: AdapterRows


class ActiveAdapters:
    """One set of adapters, and the forms their matrices are needed in, each made when first asked for."""

    def __init__(
        self, adapter_ids: Sequence[str], arena: Arena, modules: Sequence[BaseModule], known_rows: dict[str, _KnownRows]
    ) -> None:
        """`known_rows` remembers, from set to set, where each adapter's matrices lie within its extent."""
        self._known_rows = known_rows
        self.positions = {adapter_id: position for position, adapter_id in enumerate(adapter_ids)}
        self._arena = arena
        self._modules = modules
        self._plans = [arena.plan(adapter_id) for adapter_id in adapter_ids]
        self._entries = [plan.entries for plan in self._plans]
        self._flats = [arena.flat(adapter_id) for adapter_id in adapter_ids]
        self._version = arena.version
        self._layouts: dict[tuple[tuple[int, ...], tuple[float, ...]], Layout] = {}
        self._stacks: dict[int, Stack] = {}
        self._gains: dict[int, Tensor | None] = {}
        self.touched = frozenset(index for entries in self._entries for index in entries)

    def serves(self, adapter_ids: Set[str]) -> bool:
        """Whether a step of just these may use this set: all are in, where they were, at no more than twice their rows.

        An adapter whose last request ended stays in, multiplied by zero, until half the rows are such.
        """
        if not adapter_ids <= self.positions.keys() or not self._is_in_place():
            return False
        wanted = [self.positions[adapter_id] for adapter_id in adapter_ids]
        return sum(plan.rank for plan in self._plans) <= 2 * sum(self._plans[position].rank for position in wanted)

    def _is_in_place(self) -> bool:
        """Whether all of them still lie where they did: what else lies there now might be no number times zero."""
        if self._version != self._arena.version:
            if not all(
                adapter_id in self._arena and self._arena.flat(adapter_id).data_ptr() == flat.data_ptr()
                for adapter_id, flat in zip(self.positions, self._flats, strict=True)
            ):
                return False
            self._version = self._arena.version
        return True

    def gain(self, index: int, position: int) -> Tensor | None:
        """DoRA's of one adapter for one module. Shape [out]."""
        entry = self._entries[position].get(index)
        return None if entry is None else entry.gain_of(self._flats[position])

    def factors(self, index: int, position: int) -> tuple[Tensor, Tensor, float] | None:
        """A, Bᵀ and scale of one adapter for one module."""
        entry, flat = self._entries[position].get(index), self._flats[position]
        return None if entry is None else (entry.a_of(flat), entry.b_of(flat), entry.scale)

    def gains(self, index: int) -> Tensor | None:
        """DoRA's; ones for adapters without any, and in one more row for the base. Shape [G + 1, out], or None."""
        if index not in self._gains:
            found = [entries[index].gain_of(flat) if index in entries else None
                     for entries, flat in zip(self._entries, self._flats, strict=True)]  # fmt: skip
            some = next((gain for gain in found if gain is not None), None)
            ones = None if some is None else torch.ones_like(some)
            self._gains[index] = None if ones is None else torch.stack(
                [*(ones if gain is None else gain for gain in found), ones]
            )  # fmt: skip
        return self._gains[index]

    @cached_property
    def table(self) -> DecodeTable:
        itemsize = self._flats[0].element_size()
        return DecodeTable(
            [module.in_features for module in self._modules],
            [module.out_features for module in self._modules],
            [self._rows(plan, itemsize) for plan in self._plans],
            [flat.data_ptr() for flat in self._flats],
        )

    def _rows(self, plan: AdapterPlan, itemsize: int) -> AdapterRows:
        known = self._known_rows.get(plan.adapter.id)
        if known is None or known.plan is not plan:
            known = _KnownRows(plan, _rows(plan, len(self._modules), itemsize))
            self._known_rows[plan.adapter.id] = known
        return known.rows

    def num_to_stack(self, index: int) -> int:
        """Elements that must be copied before a module has its stack."""
        if index in self._stacks:
            return 0
        present = [entries[index] for entries in self._entries if index in entries]
        return sum(entry.rank * (entry.module.in_features + entry.module.out_features) for entry in present)

    def stack(self, index: int) -> Stack:
        if index not in self._stacks:
            self._stacks[index] = self._stack(index)
        return self._stacks[index]

    def _stack(self, index: int) -> Stack:
        present = [(entries[index], flat) for entries, flat in zip(self._entries, self._flats, strict=True)
                   if index in entries]  # fmt: skip
        return Stack(
            layout=self._layout([entries.get(index) for entries in self._entries], like=present[0][1]),
            a=torch.cat([entry.a_of(flat) for entry, flat in present]),
            b=torch.cat([entry.b_of(flat) for entry, flat in present]),
        )

    def _layout(self, entries: Sequence[ModuleEntry | None], like: Tensor) -> Layout:
        ranks = tuple(entry.rank if entry else 0 for entry in entries)
        scale = tuple(entry.scale if entry else 0.0 for entry in entries)
        if (ranks, scale) not in self._layouts:
            repeats = torch.tensor(ranks)
            self._layouts[ranks, scale] = Layout(
                row_owner=torch.arange(len(ranks)).repeat_interleave(repeats).to(like.device),
                row_scale=torch.tensor(scale).repeat_interleave(repeats).to(like),
            )
        return self._layouts[ranks, scale]


class TokenGroups:
    """Which adapter each token of one view of the step belongs to: all tokens, or those that are sampled."""

    def __init__(
        self, parts: Sequence[Parts], active: ActiveAdapters, device: torch.device, *, one_by_one: bool = False
    ) -> None:
        """`one_by_one`: nothing of one token may depend on which others there are."""
        self.one_by_one = one_by_one
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
        return [(begin, end, owner) for begin, end, owner in self.runs if end - begin >= LONG_RUN]

    @cached_property
    def rest(self) -> DecodeStep | None:
        """The tokens outside of long runs."""
        owners = list(self.owners)
        for begin, end, _ in self.long_runs:
            owners[begin:end] = [-1] * (end - begin)
        return DecodeStep(self._active.table, owners) if max(owners, default=-1) >= 0 else None

    @cached_property
    def singles(self) -> list[DecodeStep | None]:
        """For each token a step of it alone; None where it belongs to no adapter, or to a composition."""
        return [DecodeStep(self._active.table, [-1] * token + [some[0][0]]) if len(some) == 1 and some[0][1] == 1.0
                else None for token, some in enumerate(self.parts)]  # fmt: skip

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


class LoraLayers:
    """The wrapped layers of one model and the step they work on."""

    def __init__(self, arena: Arena) -> None:
        self.step: LoraStep | None = None
        self._arena = arena
        self._has_kernel = is_available(arena.dtype, arena.device)
        self._modules: list[BaseModule] = []
        self._known_rows: dict[str, _KnownRows] = {}
        self._recent: list[ActiveAdapters] = []
        self._left_to_stack = 0

    def wrap(self, layer: nn.Module, module: BaseModule, *, behind_selection: bool) -> None:
        """Replace the layer's `forward` by one that adds the step's adapters. To be called in the order of `index`."""
        forward: Callable[[Tensor], Tensor] = layer.forward
        bias = getattr(layer, "bias", None)
        index = module.index
        assert index == len(self._modules)
        self._modules.append(module)

        def forward_with_lora(x: Tensor) -> Tensor:
            y = forward(x)
            step = self.step
            if step is not None and index in step.active.touched:
                groups = step.sampled if behind_selection else step.tokens
                self._add(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), index, step.active, groups, bias)
            return y

        layer.forward = forward_with_lora

    def begin(
        self, owners: Sequence[Owners], sampled: Sequence[int], device: torch.device, *, one_by_one: bool = False
    ) -> None:
        """Set the step. `owners[t]` are token t's adapters; `sampled` are the token numbers behind the selection.

        `one_by_one`: what a token gets does not depend, not in its last bit, on the others.
        """
        self._left_to_stack = _MAX_STACKED
        kinds = set(owners)
        names = tuple(sorted({adapter_id for some in kinds for adapter_id, _ in some}))
        if not names:
            self.step = None
            return
        active = self._active(names)
        known = {some: tuple((active.positions[name], weight) for name, weight in some) for some in kinds}
        parts = [known[some] for some in owners]
        self.step = LoraStep(
            active=active,
            tokens=TokenGroups(parts, active, device, one_by_one=one_by_one),
            sampled=TokenGroups([parts[token] for token in sampled], active, device, one_by_one=one_by_one),
        )

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
        if groups.one_by_one:
            self._add_one_by_one(y, x.contiguous(), index, active, groups, bias)
            return
        gains = active.gains(index)
        if gains is not None and bias is not None:
            y.sub_(bias)
        if groups.is_composed:
            _add_composed(y, x, index, active, groups)
        elif self._has_kernel or groups.prefers_runs or not self._may_stack(index, active):
            for begin, end, owner in groups.long_runs if self._has_kernel else groups.runs:
                if (factors := active.factors(index, owner)) is not None:
                    add_run(y[begin:end], x[begin:end], *factors)
            if self._has_kernel and (rest := groups.rest) is not None:
                add_decode(y, x.contiguous(), active.table, index, rest)
        else:
            stack = active.stack(index)
            add_masked(y, x, stack.a, stack.b, groups.mask(stack.layout))
        if gains is not None:
            y.mul_(gains[groups.owner])
            if bias is not None:
                y.add_(bias)

    def _add_one_by_one(
        self, y: Tensor, x: Tensor, index: int, active: ActiveAdapters, groups: TokenGroups, bias: Tensor | None
    ) -> None:
        """As `_add`, each token in calls of its own whose shapes and memory alignments never vary."""
        for token, parts in enumerate(groups.parts):
            gain = active.gain(index, parts[0][0]) if len(parts) == 1 else None
            row = y[token]
            if gain is not None and bias is not None:
                row.sub_(bias)
            if self._has_kernel and (single := groups.singles[token]) is not None:
                add_decode(y, x, active.table, index, single)
            else:
                for position, weight in parts:
                    if (factors := active.factors(index, position)) is not None:
                        a, b, scale = factors
                        row.add_((x[token : token + 1].clone() @ a.t() @ b).mul_(scale * weight)[0])
            if gain is not None:
                row.mul_(gain)
                if bias is not None:
                    row.add_(bias)


def _rows(plan: AdapterPlan, num_modules: int, itemsize: int) -> AdapterRows:
    """Where an adapter's matrices lie, as the decode kernel wants it."""
    rows = AdapterRows(
        a=np.zeros(num_modules, dtype=np.uint64),
        b=np.zeros(num_modules, dtype=np.uint64),
        rank=np.zeros(num_modules, dtype=np.int32),
        scale=np.zeros(num_modules, dtype=np.float32),
    )
    for index, entry in plan.entries.items():
        rows.a[index], rows.b[index] = entry.a * itemsize, entry.b * itemsize
        rows.rank[index], rows.scale[index] = entry.rank, entry.scale
    return rows


def _add_composed(y: Tensor, x: Tensor, index: int, active: ActiveAdapters, groups: TokenGroups) -> None:
    """Stretch by stretch: y += Σ w · scale · B·A·x."""
    for begin, end, parts in groups.stretches:
        for position, weight in parts:
            if (factors := active.factors(index, position)) is not None:
                a, b, scale = factors
                add_run(y[begin:end], x[begin:end], a, b, scale * weight)
