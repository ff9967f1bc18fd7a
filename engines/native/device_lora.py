"""LoRA beside the linear layers by the Triton kernels: adapters of any rank are read where they lie in the arena.

Layers that are given the same tensor (q, k and v; gate and up) share one `shrink`. What the kernels read is a table of
one row an adapter, written when the adapter is first computed with, and again after it has moved.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraplex.engines.adapters.arena import Arena
from loraplex.engines.adapters.peft import AdapterPlan, BaseModule
from loraplex.engines.native.compiled_ops import followed_by
from loraplex.engines.native.lora import Owners
from loraplex.kernels.lora.expand import expand
from loraplex.kernels.lora.shrink import num_splits, shrink
from loraplex.kernels.lora.table import NOBODY, AdapterTable, Tiles
from loraplex.kernels.triton_support import padded

NUM_SLOTS = 4096  # adapters whose rows are kept, some tens of bytes a module each
_MOST_KNOWN = 256  # sets of adapters
# Tokens in one tile: few where most adapters have one or two, as in decoding, many where they have long runs.
_SMALL_TILE, _LARGE_TILE = 16, 64


@dataclass(frozen=True, slots=True)
class _Together:
    """Some adapters: each one's slot, the modules that they touch, and their largest rank, up to a power of two."""

    slots: dict[str, int]
    touched: frozenset[int]
    max_rank: int


@dataclass(frozen=True, slots=True)
class _Row:
    """What the table says of one adapter: its slot, and the plan and place that it was written from."""

    slot: int
    plan: AdapterPlan
    offset: int


class _Table:
    """The adapters' rows, the least recently used of which gives way."""

    def __init__(self, arena: Arena, num_modules: int) -> None:
        self._arena = arena
        self._rows: dict[str, _Row] = {}
        self._free = list(range(NUM_SLOTS))
        self._known: dict[frozenset[str], _Together] = {}  # as long as the arena and the rows stay as they are
        self._version = arena.version
        self.table = AdapterTable.empty(arena.buffer, NUM_SLOTS, num_modules)

    def together(self, adapter_ids: frozenset[str]) -> _Together:
        """Of the adapters of a step, written where they are not what the arena has by now."""
        if self._version != self._arena.version:
            self._known.clear()
            self._version = self._arena.version
        found = self._known.get(adapter_ids)
        if found is None:
            slots = self.slots(sorted(adapter_ids))
            plans = [self._arena.plan(adapter_id) for adapter_id in adapter_ids]
            touched = frozenset(index for plan in plans for index in plan.entries)
            found = _Together(slots, touched, padded(max(plan.rank for plan in plans)))
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[adapter_ids] = found
        return found

    def slots(self, adapter_ids: Iterable[str]) -> dict[str, int]:
        """The slot of each, written where it is not what the arena has by now. At most NUM_SLOTS at a time."""
        found = {}
        for adapter_id in adapter_ids:
            plan, offset = self._arena.plan(adapter_id), int(self._arena.flat(adapter_id).storage_offset())
            row = self._rows.pop(adapter_id, None)
            if row is None or row.plan is not plan or row.offset != offset:
                row = _Row(row.slot if row is not None else self._slot(), plan, offset)
                self._write(row)
            self._rows[adapter_id] = row
            found[adapter_id] = row.slot
        return found

    def _slot(self) -> int:
        return self._free.pop() if self._free else self._rows.pop(next(iter(self._rows))).slot

    def _write(self, row: _Row) -> None:
        self._known.clear()
        table = self.table
        columns = {name: getattr(table, name)[row.slot] for name in ("a", "b", "gain", "rank", "scale")}
        fresh = {name: torch.zeros_like(column, device="cpu") for name, column in columns.items()}
        fresh["gain"].fill_(-1)
        for index, entry in row.plan.entries.items():
            fresh["a"][index], fresh["b"][index] = row.offset + entry.a, row.offset + entry.b
            fresh["rank"][index], fresh["scale"][index] = entry.rank, entry.scale
            if entry.gain is not None:
                fresh["gain"][index] = row.offset + entry.gain
        for name, column in columns.items():
            column.copy_(fresh[name])


@dataclass(frozen=True, slots=True)
class _View:
    """The tokens one layer sees. Round n has the n-th adapter of each token, so that no token is in it twice."""

    rounds: tuple[Tiles, ...]


@dataclass(frozen=True, slots=True)
class _Step:
    """`sampled` is the view of the layers behind the selection of tokens (lm_head)."""

    adapters: _Together
    tokens: _View
    sampled: _View


@dataclass(frozen=True, slots=True)
class _Shrunk:
    """What the layers of one group are given, made smaller: h, as `shrink` gives it. `served` have taken theirs.

    A tensor alone is no proof that its numbers are still those: a compiled layer makes others in the same memory.
    So each layer of the group takes its own once.
    """

    group: int
    x: Tensor
    tiles: Tiles
    h: Tensor
    served: set[int]

    def has(self, module: BaseModule, x: Tensor, tiles: Tiles) -> bool:
        return self.x is x and self.tiles is tiles and self.group == module.input and module.index not in self.served


class DeviceLora:
    """Implements what `LoraLayers` does, with the kernels."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._layers: list[nn.Module] = []
        self._modules: list[BaseModule] = []
        self._groups: dict[int, list[int]] = {}  # input -> the modules that are given it
        self._members: dict[int, Tensor] = {}  # the same, as the kernel wants it
        self._table: _Table | None = None
        self._step: _Step | None = None
        self._shrunk: _Shrunk | None = None  # of the last group
        self._repeated: dict[int, Tiles] = {}  # by number of tokens: what replayed steps read

    def wrap(self, layer: nn.Module, module: BaseModule, *, behind_selection: bool) -> None:
        """As `LoraLayers.wrap`."""
        bias = getattr(layer, "bias", None)
        assert module.index == len(self._modules)
        self._layers.append(layer)
        self._modules.append(module)
        self._groups.setdefault(module.input, []).append(module.index)

        def add(y: Tensor, x: Tensor) -> None:
            step = self._step
            if step is not None and module.index in step.adapters.touched:
                view = step.sampled if behind_selection else step.tokens
                for tiles in view.rounds:
                    self._add(y.view(-1, y.shape[-1]), x, module, step, tiles, bias)

        layer.forward = followed_by(layer.forward, add)

    def compile_kernels(self, max_rank: int) -> None:
        """Have compiled now what adapters of up to that rank want: launches for tokens that are nobody's."""
        device, dtype = self._arena.device, self._arena.dtype
        table, known = self._made_table().table, set[tuple[int, int, bool]]()
        for layer, module in zip(self._layers, self._modules, strict=True):
            bias = getattr(layer, "bias", None)
            sizes = (module.in_features, module.out_features, bias is not None)
            if sizes in known:
                continue
            known.add(sizes)
            x, y = (torch.zeros(1, width, dtype=dtype, device=device) for width in sizes[:2])
            for block in (_SMALL_TILE, _LARGE_TILE):
                tiles = Tiles.of([NOBODY], None, block, device)
                for rank in {min(padded(max_rank), rank) for rank in (16, 32, 64)}:
                    h = shrink(x, table, self._members[module.input], tiles, rank, splits=1)
                expand(y, h[0], table, module.index, tiles, bias)

    def begin(self, owners: Sequence[Owners], sampled: Sequence[int], device: torch.device) -> None:
        """As `LoraLayers.begin`."""
        self._step = self._shrunk = None
        if names := _names(owners):
            some = self._made_table().together(names)
            sampled_owners = [owners[token] for token in sampled]
            self._step = _Step(some, *(_view(own, some.slots, device) for own in (owners, sampled_owners)))

    def may_repeat(self, owners: Sequence[Owners]) -> bool:
        """As `LoraLayers.may_repeat`."""
        kinds = set(owners)
        return all(len(some) <= 1 for some in kinds) and all(
            self._arena.plan(adapter_id).why_alone is None for some in kinds for adapter_id, _ in some
        )

    def begin_repeated(self, owners: Sequence[Owners], sampled: Sequence[int], num_tokens: int) -> Hashable:
        """As `LoraLayers.begin_repeated`, of a step all of whose tokens are sampled.

        Result: the modules that its adapters touch, and their largest rank, up to a power of two; None without.
        """
        assert len(sampled) == len(owners)
        self._step = self._shrunk = None
        names = _names(owners)
        if not names:
            return None
        together = self._made_table().together(names)
        own = [together.slots[some[0][0]] if some else NOBODY for some in owners]
        weights = [some[0][1] if some else 1.0 for some in owners]
        fresh = Tiles.of(own, weights, _SMALL_TILE, torch.device("cpu"), room=(num_tokens, num_tokens))
        tiles = self._repeated.get(num_tokens)
        if tiles is None:
            tiles = self._repeated[num_tokens] = fresh.to(self._arena.device)
        else:
            tiles.become(fresh)
        view = _View((tiles,))
        self._step = _Step(together, view, view)
        return together.touched, together.max_rank

    def _made_table(self) -> _Table:
        if self._table is None:
            self._table = _Table(self._arena, len(self._modules))
            self._members = {key: torch.tensor(group, dtype=torch.int32, device=self._arena.device)
                             for key, group in self._groups.items()}  # fmt: skip
        return self._table

    def _add(self, y: Tensor, x: Tensor, module: BaseModule, step: _Step, tiles: Tiles, bias: Tensor | None) -> None:
        """y: Shape [T, out], changed in place. x: Shape [..., in]."""
        assert self._table is not None
        table, members = self._table.table, self._members[module.input]
        last = self._shrunk
        if last is None or not last.has(module, x, tiles):
            rows = x.reshape(-1, x.shape[-1])
            max_rank = step.adapters.max_rank
            splits = num_splits(rows.shape[1], tiles, members.shape[0], max_rank)
            h = shrink(rows, table, members, tiles, max_rank, splits)
            last = self._shrunk = _Shrunk(module.input, x, tiles, h, set())
        last.served.add(module.index)
        expand(y, last.h[self._groups[module.input].index(module.index)], table, module.index, tiles, bias)


def _names(owners: Sequence[Owners]) -> frozenset[str]:
    return frozenset(adapter_id for some in set(owners) for adapter_id, _ in some)


def _view(owners: Sequence[Owners], slots: dict[str, int], device: torch.device) -> _View:
    most = max((len(some) for some in owners), default=0)
    rounds = []
    for number in range(most):
        own = [slots[some[number][0]] if number < len(some) else NOBODY for some in owners]
        weights = [some[number][1] if number < len(some) else 1.0 for some in owners]
        num_adapters = len(set(own) - {NOBODY})
        block = _LARGE_TILE if len(own) > _LARGE_TILE * num_adapters else _SMALL_TILE
        rounds.append(Tiles.of(own, weights, block, device))
    return _View(tuple(rounds))
