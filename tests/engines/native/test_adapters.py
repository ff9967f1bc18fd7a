"""The host and device tiers: how adapters come, a little at a time, and what they leave behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from support.core import make_core, prompt_of, request, run, tokens
from support.models import AdapterSpec, make_adapter
from support.worlds import SmallWorld

from loraplex.config.settings import Adapters
from loraplex.engines.adapters import pieces
from loraplex.engines.adapters.arena import Arena
from loraplex.engines.adapters.peft import load_adapter
from loraplex.engines.errors import AdapterError, AdapterInvalid, NoRoomBesidePins
from loraplex.engines.native.adapters import AdapterTiers
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.loading import Machine, load_machine
from loraplex.engines.native.residency import Residency
from loraplex.engines.native.scheduler import Emission
from loraplex.engines.protocol import Adapter, WeightedAdapter
from loraplex.engines.stats import AdapterTierStats, TierStats
from loraplex.kernels.lora.table import ALIGNMENT_BYTES

ITEMSIZE = 4
RANK_4_SIZE = 4 * 3 * 448  # elements of a rank 4 on the small base's attention: three layers of q, k, v and o


class Tiers:
    """Tiers over a machine's base, with a clock that a reading moves by one second."""

    def __init__(self, machine: Machine, capacity: int, host_bytes: int = 2**30) -> None:
        self.now = 0.0
        self.lengths: list[float] = []
        self.failures: list[tuple[str, AdapterError]] = []
        self.base = machine.base
        self.arena = Arena(capacity, machine.arena.dtype, machine.arena.device)
        self.residency = Residency(capacity)
        self.tiers = AdapterTiers(
            machine.base,
            self.arena,
            self.residency,
            host_bytes,
            lambda adapter_id, error: self.failures.append((adapter_id, error)),
            max_names=3,
            clock=self._tick,
        )

    def _tick(self) -> float:
        self.now += 1.0
        return self.now

    def poll(self, seconds: float = 1e9) -> None:
        """One step's work."""
        began = self.now
        self.tiers.poll([], seconds)
        self.lengths.append(self.now - began)

    def poll_until(self, condition: Callable[[], bool], seconds: float = 1e9) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            if self.tiers.is_loading:
                time.sleep(0.001)
            self.poll(seconds)

    def bring(self, adapter: Adapter) -> None:
        """To the device, for a request that ends then."""
        self.tiers.enter(adapter)
        self.poll_until(lambda: adapter.id in self.residency)
        self.tiers.leave(adapter.id)

    def stats(self) -> tuple[TierStats, TierStats]:
        return self.tiers.stats()


@pytest.fixture(scope="session")
def machine(small: SmallWorld) -> Machine:
    return load_machine(small.settings(), lambda progress: None)


@pytest.fixture
def make(machine: Machine) -> Iterator[Callable[..., Tiers]]:
    made: list[Tiers] = []

    def make(capacity: int = 2**21, host_bytes: int = 2**30) -> Tiers:
        made.append(Tiers(machine, capacity, host_bytes))
        return made[-1]

    yield make
    for one in made:
        one.tiers.close()


def renamed(adapter: Adapter, name: str) -> Adapter:
    return msgspec.structs.replace(adapter, id=f"sha-{name}", name=name)


@pytest.mark.parametrize("kind", ["rank-8", "rank-32-dora"])
def test_poll_works_no_longer_than_it_is_allowed_and_gets_there(
    small: SmallWorld, make: Callable[..., Tiers], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 2**8)
    tiers, adapter = make(), small.adapters[kind]
    tiers.tiers.enter(adapter)
    tiers.poll_until(lambda: adapter.id in tiers.residency, seconds=3.0)
    working = [length for length in tiers.lengths if length > 1.0]  # the others waited for the thread
    assert max(working) <= 3.0 + 4  # readings that begin and end a poll, or take one in
    assert len(working) > 12
    torch.testing.assert_close(tiers.arena.flat(adapter.id), load_adapter(adapter, tiers.base).flat, rtol=0, atol=0)


def test_no_piece_is_larger_than_its_bound() -> None:
    for shape in ((3_000_000,), (300, 5000), (7, 200_000)):
        tensor = torch.zeros(shape)
        sizes = [tensor[rows].numel() for rows in pieces.slices(tensor)]
        assert sum(sizes) == tensor.numel()
        assert max(sizes) <= max(pieces.PIECE, tensor[0].numel())


def test_non_finite_is_found_wherever_it_stands_and_an_overflowing_sum_is_none() -> None:
    flat = torch.full((pieces.PIECE + 5,), 3e38)
    assert pieces.exhaust(pieces.are_finite(flat))
    for place, value in ((0, torch.inf), (pieces.PIECE + 4, torch.nan), (1, -torch.inf)):
        spoilt = flat.clone()
        spoilt[place] = value
        assert not pieces.exhaust(pieces.are_finite(spoilt))


@pytest.mark.parametrize("num_polls", [0, 1, 3, 10, 40])
def test_request_that_leaves_takes_along_what_was_on_its_way_for_it(
    small: SmallWorld, make: Callable[..., Tiers], num_polls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is: being prepared, or copied."""
    monkeypatch.setattr(pieces, "PIECE", 2**8)
    tiers, adapter = make(), small.adapters["rank-8"]
    tiers.tiers.enter(adapter)
    if num_polls:
        tiers.poll_until(lambda: not tiers.tiers.is_loading, seconds=0.0)
    for _ in range(num_polls):
        tiers.poll(seconds=0.0)
    assert adapter.id not in tiers.residency
    tiers.tiers.leave(adapter.id)
    assert (tiers.tiers.is_loading, tiers.tiers.is_copying, tiers.residency.num_used) == (False, False, 0)
    assert [found.tier for found in tiers.tiers.residents()] in ([], ["host"])
    tiers.bring(adapter)
    torch.testing.assert_close(tiers.arena.flat(adapter.id), load_adapter(adapter, tiers.base).flat, rtol=0, atol=0)


def test_adapter_that_another_request_waits_for_stays_on_its_way_and_is_read_once(
    small: SmallWorld, make: Callable[..., Tiers]
) -> None:
    tiers, adapter = make(), small.adapters["rank-8"]
    for _ in range(3):
        tiers.tiers.enter(adapter)
    tiers.tiers.leave(adapter.id)
    tiers.poll_until(lambda: adapter.id in tiers.residency)
    host, device = tiers.stats()
    assert (sum(host.load_durations.counts), sum(device.load_durations.counts)) == (1, 1)
    [found] = tiers.tiers.residents()
    assert (found.tier, found.num_requests) == ("device", 2)


def test_adapters_that_the_host_has_no_room_for_together_all_come_to_the_device(
    small: SmallWorld, make: Callable[..., Tiers]
) -> None:
    """One by one, as those before them end: the one that left the host for another is read again."""
    size = load_adapter(small.adapters["rank-4"], make().base).plan.size
    tiers = make(capacity=size, host_bytes=1)
    waiting = {name: renamed(small.adapters["rank-4"], name) for name in "abc"}
    for adapter in waiting.values():
        tiers.tiers.enter(adapter)
    while waiting:
        tiers.poll_until(lambda: any(adapter.id in tiers.residency for adapter in waiting.values()))
        [name] = [name for name, adapter in waiting.items() if adapter.id in tiers.residency]
        adapter = waiting.pop(name)
        tiers.residency.start(adapter.id)
        for _ in range(50):
            time.sleep(0.001)
            tiers.poll()
        tiers.residency.stop(adapter.id)
        tiers.tiers.leave(adapter.id)
    assert not tiers.failures


def test_arena_of_mixed_ranks_holds_exactly_the_adapters_own_bytes(
    small: SmallWorld, make: Callable[..., Tiers], tmp_path: Path
) -> None:
    """Each matrix begins on a cache line: that is all that is added."""
    tiers = make()
    total = num_matrices = own_bytes = 0
    for rank in (4, 6, 8, 16, 32, 64, 128):
        adapter = make_adapter(small.directory, AdapterSpec(f"r{rank}", rank), tmp_path)
        tiers.bring(adapter)
        plan = tiers.arena.plan(adapter.id)
        for entry in plan.entries.values():
            for numel in (entry.rank * entry.module.in_features, entry.rank * entry.module.out_features):
                total += -(-numel * ITEMSIZE // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                own_bytes += numel * ITEMSIZE
                num_matrices += 1
    _, device = tiers.stats()
    assert device.num_bytes == total == sum(found.num_bytes for found in tiers.tiers.residents())
    assert 0 <= total - own_bytes < num_matrices * ALIGNMENT_BYTES


@pytest.mark.parametrize(("source", "target"), [(200_000, 0), (200_000, 199_937), (70_000, 1000)])
def test_moved_adapter_is_whole_though_its_extents_overlap(
    small: SmallWorld, machine: Machine, source: int, target: int
) -> None:
    loaded = load_adapter(small.adapters["rank-64-mlp"], machine.base)
    assert loaded.plan.size > pieces.PIECE
    arena = Arena(2**19, machine.arena.dtype, machine.arena.device)
    pieces.exhaust(arena.write(source, loaded))
    arena.publish(loaded.plan, source)
    pieces.exhaust(arena.move(loaded.plan.adapter.id, target))
    arena.publish(loaded.plan, target)
    assert torch.equal(arena.flat(loaded.plan.adapter.id), loaded.flat)


def test_populated_arena_keeps_what_is_written_and_ends_where_it_ended(small: SmallWorld, machine: Machine) -> None:
    """Whoever populates next to an adapter, or beyond the last element, changes nothing."""
    loaded = load_adapter(small.adapters["rank-64-mlp"], machine.base)
    arena = Arena(loaded.plan.size + 1001, machine.arena.dtype, machine.arena.device)
    pieces.exhaust(arena.write(1001, loaded))
    arena.publish(loaded.plan, 1001)
    for size in (0, 1, 1000, 10_000, 2**30):
        arena.populate(size)
    assert torch.equal(arena.flat(loaded.plan.adapter.id), loaded.flat)


def test_fragmented_arena_is_compacted_under_a_running_adapter(small: SmallWorld, tmp_path: Path) -> None:
    """Nobody is evicted, and both answer as PEFT does: the one that was moved while it ran, and the one let in."""
    specs = {rank: AdapterSpec(f"attention-{rank}", rank) for rank in (4, 8, 12)}
    made = {rank: make_adapter(small.directory, spec, tmp_path) for rank, spec in specs.items()}
    settings = msgspec.structs.replace(small.settings(), adapters=Adapters(device_bytes=4 * RANK_4_SIZE * ITEMSIZE))
    core = EngineCore(load_machine(settings, lambda progress: None))
    core.submit(request("first", prompt_of(1, 8), made[8], max_tokens=2))
    run(core)
    core.submit(request("moved", prompt_of(2, 8), made[4], max_tokens=300, ignore_eos=True))
    found: list[Emission] = []
    while len(found) < 20:
        found += core.step()
    assert core.adapters.num_on_device == 2
    core.adapters.unload(made[8].id)
    core.submit(request("large", prompt_of(3, 8), made[12]))
    emissions = run(core)
    assert tokens(emissions["large"]) == small.oracle.greedy(prompt_of(3, 8), 12, made[12])
    moved = tokens([*found, *emissions["moved"]])
    expected = small.oracle.greedy(prompt_of(2, 8), 300, made[4], eos_token_id=-1)
    assert moved == expected
    stats = core.stats()
    assert [tier.total_evictions for tier in stats.tiers] == [0, 0]
    assert stats.tiers[1].num_bytes == 4 * RANK_4_SIZE * ITEMSIZE


@pytest.mark.parametrize("pins", [False, True], ids=["load", "pin"])
def test_adapter_asked_for_while_it_slides_is_there_when_it_stops_and_not_read_again(
    small: SmallWorld, make: Callable[..., Tiers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pins: bool
) -> None:
    """Its extents overlap, so nobody computes with it on the way; the host does not hold it any more."""
    monkeypatch.setattr(pieces, "PIECE", 2**8)
    first, slides, large = (
        renamed(make_adapter(small.directory, AdapterSpec(f"attention-{rank}", rank), tmp_path), f"rank-{rank}")
        for rank in (4, 6, 5)
    )
    tiers = make(capacity=3 * RANK_4_SIZE, host_bytes=1)
    told: list[AdapterError | None] = []
    for adapter in (first, slides):
        tiers.bring(adapter)
    tiers.tiers.unload(first.id)
    tiers.tiers.enter(large)
    tiers.poll_until(lambda: slides.id not in tiers.residency, seconds=2.0)
    assert tiers.residency.holds(slides.id)
    if pins:
        tiers.tiers.pin(slides, pinned=True, done=told.append)
    else:
        tiers.tiers.load(slides, told.append)
    assert (told, tiers.tiers.is_loading) == ([], False)
    tiers.poll_until(lambda: large.id in tiers.residency)
    assert (told, slides.id in tiers.residency, tiers.residency.is_pinned(slides.id)) == ([None], True, pins)
    tiers.tiers.unload(slides.id)


@pytest.mark.parametrize("is_request", [True, False])
def test_adapter_without_room_beside_the_pinned_is_refused_at_once(
    small: SmallWorld, make: Callable[..., Tiers], is_request: bool
) -> None:
    """A request and a load alike; one that fits beside them, or that is pinned itself, has its place."""
    base, large = make().base, small.adapters["rank-8"]
    size, room = (load_adapter(adapter, base).plan.size for adapter in (small.adapters["rank-4"], large))
    tiers = make(capacity=room)
    pinned, fits = (renamed(small.adapters["rank-4"], name) for name in ("pinned", "fits"))
    told: list[AdapterError | None] = []
    tiers.tiers.pin(pinned, pinned=True, done=told.append)
    tiers.poll_until(lambda: told == [None])
    if is_request:
        tiers.tiers.enter(large)
        tiers.poll_until(lambda: bool(tiers.failures))
        told += [error for _, error in tiers.failures]
    else:
        tiers.tiers.load(large, told.append)
        tiers.poll_until(lambda: len(told) == 2)
    assert isinstance(told[1], NoRoomBesidePins)
    assert f"{room * ITEMSIZE} bytes exceed the {(room - size) * ITEMSIZE} that" in str(told[1])
    tiers.bring(fits)
    tiers.tiers.pin(pinned, pinned=False, done=told.append)
    if is_request:
        tiers.tiers.leave(large.id)
    tiers.bring(large)
    assert [found.name for found in tiers.tiers.residents(only_on_device=True)] == ["rank-8"]


def test_composition_without_room_beside_a_later_pin_is_refused_and_another_is_not(
    small: SmallWorld, tmp_path: Path
) -> None:
    made = [make_adapter(small.directory, AdapterSpec(f"part-{n}", 4), tmp_path) for n in range(3)]
    for number, adapter in enumerate(made):
        made[number] = msgspec.structs.replace(adapter, id=f"sha-part-{number}")
    settings = msgspec.structs.replace(small.settings(), adapters=Adapters(device_bytes=2 * RANK_4_SIZE * ITEMSIZE))
    core = EngineCore(load_machine(settings, lambda progress: None))
    told: list[AdapterError | None] = []
    core.submit(request("runs", prompt_of(1, 8), made[0], max_tokens=300, ignore_eos=True))
    while not core.scheduler.running:
        core.step()
    parts = {"waits": (made[0], made[1]), "never": (made[1], made[2])}
    for name, (first, second) in parts.items():
        composition = (WeightedAdapter(first, 1.0), WeightedAdapter(second, 1.0))
        core.submit(msgspec.structs.replace(request(name, prompt_of(2, 8)), composition=composition))
    core.adapters.pin(made[0], pinned=True, done=told.append)
    emissions = run(core)
    assert told == [None]
    assert {name: type(found[-1].error) for name, found in emissions.items()} == {
        "runs": type(None),
        "waits": type(None),
        "never": NoRoomBesidePins,
    }


def test_figures_tell_hits_misses_loads_and_evictions_by_tier_and_adapter(
    small: SmallWorld, make: Callable[..., Tiers]
) -> None:
    size = load_adapter(small.adapters["rank-4"], make().base).plan.size
    tiers = make(capacity=2 * size, host_bytes=3 * size * ITEMSIZE)
    for name in "abacdeb":
        tiers.bring(renamed(small.adapters["rank-4"], name))
    host, device = tiers.stats()
    assert (device.total_hits, device.total_misses, device.total_evictions) == (1, 6, 4)
    assert (host.total_hits, host.total_misses, host.total_evictions) == (0, 6, 3)
    assert (host.num_adapters, host.num_bytes, host.capacity_bytes) == (3, 3 * size * ITEMSIZE, 3 * size * ITEMSIZE)
    assert (device.num_adapters, device.num_bytes) == (2, 2 * size * ITEMSIZE)
    assert (sum(host.load_durations.counts), sum(device.load_durations.counts)) == (6, 6)
    told = {(found.tier, found.name): found for found in tiers.tiers.stats_by_adapter()}
    assert set(told) == {(tier, name) for tier in ("host", "device") for name in ("a", "b", "c", "(others)")}
    assert told["device", "a"] == AdapterTierStats(
        name="a",
        tier="device",
        total_hits=1,
        total_misses=1,
        total_evictions=1,
        total_loads=1,
        load_seconds=told["device", "a"].load_seconds,
    )
    assert (told["device", "(others)"].total_misses, told["host", "b"].total_loads) == (2, 2)
    assert {found.name for found in tiers.tiers.residents()} == {"d", "e", "b"}  # the others are nowhere here


def test_damaged_file_fails_its_own_adapter_only(small: SmallWorld, make: Callable[..., Tiers], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(
        (Path(small.adapters["rank-4"].path) / "adapter_config.json").read_bytes()
    )
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing of the kind")
    tiers = make()
    tiers.tiers.enter(Adapter(id="sha-bad", name="bad", path=str(tmp_path)))
    tiers.tiers.enter(small.adapters["rank-4"])
    tiers.poll_until(lambda: small.adapters["rank-4"].id in tiers.residency and bool(tiers.failures))
    [(failed, error)] = tiers.failures
    assert (failed, type(error)) == ("sha-bad", AdapterInvalid)
    tiers.tiers.leave("sha-bad")
    assert [found.name for found in tiers.tiers.residents()] == ["rank-4"]


def test_stacks_are_made_a_few_modules_a_step_and_answers_stay(
    small: SmallWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the decode kernel is missing: modules that have no stack yet are computed run by run."""
    monkeypatch.setattr("loraplex.engines.native.lora.is_available", lambda dtype, device: False)
    monkeypatch.setattr("loraplex.engines.native.lora._MAX_STACKED", 8 * 128 + 1)
    core = make_core(small)
    names = ["rank-4", "rank-8", "rank-32-dora", "rank-64-mlp"]
    for name in names:
        core.submit(request(name, prompt_of(5, 9), small.adapters[name]))
    emissions = run(core)
    for name in names:
        assert tokens(emissions[name]) == small.oracle.greedy(prompt_of(5, 9), 12, small.adapters[name])
