"""The device tier's books, without a device."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.engines.native.residency import Residency


def test_place_full_evicts_the_least_recently_used() -> None:
    residency = Residency(30)
    for name in "abc":
        assert residency.place(name, 10) == []
    residency.start("a")
    residency.stop("a")
    assert residency.place("d", 10) == ["b"]


def test_place_protected_pinned_and_running_stay() -> None:
    residency = Residency(30)
    for name in "abc":
        residency.place(name, 10)
    residency.start("a")
    residency.pin("b", pinned=True)
    assert residency.place("d", 10, protected={"c"}) is None
    assert residency.place("d", 10) == ["c"]


def test_place_larger_than_the_gaps_evicts_neighbours() -> None:
    residency = Residency(30)
    for name in "abc":
        residency.place(name, 10)
    assert residency.place("d", 20) == ["a", "b"]
    assert residency.extent("d").offset == 0


class Books(RuleBasedStateMachine):
    """Extents never overlap or leave the arena, and what must stay stays, whatever happens."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency(100)
        self.running: dict[str, int] = {}
        self.sizes: dict[str, int] = {}

    @rule(name=st.sampled_from("abcdefgh"), size=st.integers(1, 60))
    def place(self, name: str, size: int) -> None:
        if name in self.residency:
            return
        evicted = self.residency.place(name, size)
        if evicted is not None:
            assert not [victim for victim in evicted if self.running.get(victim)]
            for victim in evicted:
                del self.sizes[victim]
            self.sizes[name] = size

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.sizes)))
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
        extents = sorted((self.residency.extent(name).offset, size) for name, size in self.sizes.items())
        end = 0
        for offset, size in extents:
            assert offset >= end
            end = offset + size
        assert end <= 100
        assert self.residency.num_used == sum(self.sizes.values())


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBooks = Books.TestCase
