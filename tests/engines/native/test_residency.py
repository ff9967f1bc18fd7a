"""The device tier's books, without a device."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.bench import place

from loraplex.engines.native.residency import Move, Residency, Room


def filled(capacity: int, *sizes: int) -> Residency:
    """Adapters a, b, c … of these sizes, from the arena's beginning."""
    residency = Residency(capacity)
    for name, size in zip("abcdefgh", sizes, strict=False):
        assert place(residency, name, size) == Room()
    return residency


def test_reserve_full_evicts_the_least_recently_used() -> None:
    residency = filled(30, 10, 10, 10)
    residency.start("a")
    residency.stop("a")
    assert place(residency, "d", 10) == Room(("b",))


def test_reserve_protected_pinned_and_running_stay() -> None:
    residency = filled(30, 10, 10, 10)
    residency.start("a")
    residency.pin("b", pinned=True)
    assert place(residency, "d", 10, protected={"c"}) is None
    assert residency.lacking == {"d"}
    assert place(residency, "d", 10) == Room(("c",))
    assert residency.lacking == set()


def test_reserve_larger_than_the_gaps_evicts_neighbours() -> None:
    residency = filled(30, 10, 10, 10)
    assert place(residency, "d", 20) == Room(("a", "b"))
    assert residency.extent("d").offset == 0


def test_reserved_is_not_ready_before_it_is_published() -> None:
    residency = Residency(30)
    assert residency.reserve("a", 10) == Room()
    assert residency.holds("a")
    assert "a" not in residency
    residency.publish("a")
    assert "a" in residency


def test_given_up_reservation_is_free_again_and_a_ready_one_stays() -> None:
    residency = filled(20, 10)
    residency.reserve("b", 10)
    for name in "ab":
        residency.give_up(name)
    assert ("a" in residency, residency.holds("b"), residency.num_used) == (True, False, 10)


def test_reserve_in_pieces_moves_the_least_instead_of_evicting() -> None:
    residency = filled(60, 10, 20, 10, 5, 10)
    for name in "ac":
        residency.drop(name)  # free: 0 … 9, 30 … 39, 55 … 59
    residency.start("b")
    assert residency.reserve("f", 15) == Room((), Move("d", 30, slides=False))
    assert "d" in residency  # it is read where it was
    residency.publish("d")
    assert residency.reserve("f", 15) == Room((), Move("e", 35, slides=False))
    residency.publish("e")
    assert residency.reserve("f", 15) == Room()
    assert [residency.extent(name).offset for name in "bdef"] == [10, 30, 35, 45]


def test_move_onto_its_own_extent_is_not_ready_on_the_way_and_never_a_running_one() -> None:
    residency = filled(40, 10, 20)
    residency.drop("a")  # free: 0 … 9, 30 … 39
    residency.start("b")
    assert residency.reserve("c", 20) is None
    residency.stop("b")
    assert residency.reserve("c", 20, protected={"b"}) is None
    assert residency.reserve("c", 20) == Room((), Move("b", 0, slides=True))
    assert "b" not in residency
    assert residency.reserve("d", 15) is None  # nothing is evicted or moved under a copy
    residency.publish("b")
    assert "b" in residency
    assert residency.reserve("c", 20) == Room()
    assert residency.extent("c").offset == 20


class Books(RuleBasedStateMachine):
    """Extents never overlap or leave the arena, and what must stay stays, whatever happens."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency(100)
        self.running: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.filling: set[str] = set()
        self.moves: dict[str, Move] = {}

    @rule(name=st.sampled_from("abcdefgh"), size=st.integers(1, 60))
    def reserve(self, name: str, size: int) -> None:
        if self.residency.holds(name):
            return
        room = self.residency.reserve(name, size)
        if room is None:
            return
        for victim in room.evicted:
            assert not self.running.get(victim)
            assert victim not in self.filling | self.moves.keys()
            del self.sizes[victim]
        if room.move is None:
            self.sizes[name] = size
            self.filling.add(name)
        else:
            moved = room.move.adapter_id
            assert moved not in self.filling | self.moves.keys()
            assert room.move.target < self.residency.extent(moved).offset
            overlaps = room.move.target + self.sizes[moved] > self.residency.extent(moved).offset
            assert room.move.slides == overlaps == (moved not in self.residency)
            assert not (overlaps and self.running.get(moved))
            self.moves[moved] = room.move

    @precondition(lambda self: self.filling or self.moves)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.filling | self.moves.keys())))
        self.residency.publish(name)
        self.filling.discard(name)
        if (move := self.moves.pop(name, None)) is not None:
            assert self.residency.extent(name).offset == move.target

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.filling)))
        self.residency.give_up(name)
        self.filling.discard(name)
        del self.sizes[name]

    @precondition(lambda self: any(name in self.residency for name in self.sizes))
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(name for name in self.sizes if name in self.residency)))
        self.residency.start(name)
        self.running[name] = self.running.get(name, 0) + 1

    @precondition(lambda self: any(self.running.values()))
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(name for name, count in self.running.items() if count)))
        self.residency.stop(name)
        self.running[name] -= 1

    @invariant()
    def extents_are_disjoint(self) -> None:
        extents = [(self.residency.extent(name).offset, size) for name, size in self.sizes.items()]
        for name, move in self.moves.items():
            if not move.slides:
                extents.append((move.target, self.sizes[name]))
        for (offset, size), (following, _) in pairwise([*sorted(extents), (100, 0)]):
            assert 0 <= offset <= offset + size <= following
        assert self.residency.num_used == sum(self.sizes.values())

    @invariant()
    def those_that_run_are_ready(self) -> None:
        assert all(name in self.residency for name, count in self.running.items() if count)


Books.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestBooks = Books.TestCase
