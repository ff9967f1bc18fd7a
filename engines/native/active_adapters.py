"""The adapters that a step computes with, in the forms that LoRA's kernels and GEMMs want their matrices in."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from loraplex.engines.adapters.arena import Arena
from loraplex.engines.adapters.peft import AdapterPlan, BaseModule, ModuleEntry
from loraplex.kernels.lora.decode import AdapterRows, DecodeTable


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
class Gains:
    """DoRA's of one module, by adapter; the last row is the base's.

    factors: Shape [G + 1, out], ones where there is none. are_there: Shape [G + 1, 1], bool.
    """

    factors: Tensor
    are_there: Tensor

    def bias(self, bias: Tensor, owner: Tensor) -> Tensor:
        """The bias that a token's gain must not reach: zeros where it has no gain. owner: Shape [T]. Shape [T, out]."""
        return torch.where(self.are_there[owner], bias, bias.new_zeros(()))


@dataclass(frozen=True, slots=True)
class KnownRows:
    """Where the matrices of an adapter lie, remembered while its plan is the same."""

    plan: AdapterPlan
    rows: AdapterRows


class ActiveAdapters:
    """One set of adapters, and the forms their matrices are needed in, each made when first asked for."""

    def __init__(
        self, adapter_ids: Sequence[str], arena: Arena, modules: Sequence[BaseModule], known_rows: dict[str, KnownRows]
    ) -> None:
        """`known_rows` remembers, from set to set, where each adapter's matrices lie within its extent."""
        self._known_rows = known_rows
        self.positions = {adapter_id: position for position, adapter_id in enumerate(adapter_ids)}
        self._arena = arena
        self._modules = modules
        self._plans = [arena.plan(adapter_id) for adapter_id in adapter_ids]
        self._ranks = [plan.rank for plan in self._plans]
        self._entries = [plan.entries for plan in self._plans]
        self._flats = [arena.flat(adapter_id) for adapter_id in adapter_ids]
        self._version = arena.version
        self._layouts: dict[tuple[tuple[int, ...], tuple[float, ...]], Layout] = {}
        self._stacks: dict[int, Stack] = {}
        self._gains: dict[int, Gains | None] = {}
        self.touched = frozenset(index for entries in self._entries for index in entries)

    def serves(self, adapter_ids: Set[str]) -> bool:
        """Whether a step of just these may use this set: all are in, where they were, at no more than twice their rows.

        An adapter whose last request ended stays in, multiplied by zero, until half the rows are such.
        """
        if not adapter_ids <= self.positions.keys() or not self._is_in_place():
            return False
        return sum(self._ranks) <= 2 * sum(self._ranks[self.positions[adapter_id]] for adapter_id in adapter_ids)

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

    def gains(self, index: int) -> Gains | None:
        """None where no adapter has any for the module."""
        if index not in self._gains:
            self._gains[index] = self._found_gains(index)
        return self._gains[index]

    def _found_gains(self, index: int) -> Gains | None:
        found = [self.gain(index, position) for position in range(len(self._entries))]
        some = next((gain for gain in found if gain is not None), None)
        if some is None:
            return None
        ones = torch.ones_like(some)
        return Gains(
            factors=torch.stack([*(ones if gain is None else gain for gain in found), ones]),
            are_there=torch.tensor([[gain is not None] for gain in (*found, None)], device=some.device),
        )

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
            known = KnownRows(plan, _rows(plan, len(self._modules), itemsize))
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
