"""Requests that wait for their grammars: each is compiled once, and no step looks at them meanwhile."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from support.core import make_core, prompt_of, request, run, tokens
from support.grammars import spy_on_compiling
from support.worlds import SmallWorld

from loraplex.engines.errors import EngineOverloaded, InvalidRequest
from loraplex.engines.native import grammar as grammar_module
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.grammar import Grammars
from loraplex.engines.native.scheduler import Scheduler
from loraplex.engines.native.sequence import Sequence
from loraplex.engines.protocol import GenerateRequest, Grammar


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is compiled before it is set; `compiled` notes what is."""
    gate = threading.Event()
    monkeypatch.setattr(grammar_module, "_MAX_KEPT", 4)
    return gate


@pytest.fixture
def compiled(gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return spy_on_compiling(monkeypatch, lambda: gate.wait(30))


def constrained(name: str, source: str, max_tokens: int = 2) -> GenerateRequest:
    grammar = Grammar(kind="regex", source=source)
    return request(name, prompt_of(1, 5), grammar=grammar, max_tokens=max_tokens)


def submit_many(core: EngineCore, num: int) -> None:
    for number in range(num):
        core.submit(constrained(str(number), f"a{number}b*"))


def test_more_awaited_grammars_than_are_kept_are_compiled_once_each_and_answered(
    small: SmallWorld, gate: threading.Event, compiled: list[str]
) -> None:
    gate.set()
    core = make_core(small)
    submit_many(core, 310)
    core.submit(constrained("again", "a7b*"))
    found = run(core)
    assert Counter(compiled) == Counter(f"a{number}b*" for number in range(310))
    assert len(found) == 311
    assert {len(tokens(emissions)) for emissions in found.values()} == {2}
    assert core.stats().num_waiting == 0


def test_step_looks_at_no_request_whose_grammar_is_being_compiled(
    small: SmallWorld, gate: threading.Event, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    def can_start(self: Scheduler, sequence: Sequence) -> bool:
        looks.append(sequence.request_id)
        return original(self, sequence)

    def begin(self: Grammars, grammar: Grammar, tenant: str = "") -> None:
        begun.append(grammar.source)
        original_begin(self, grammar, tenant)

    original, original_begin, begun = Scheduler._can_start, Grammars.begin, list[str]()
    monkeypatch.setattr(Scheduler, "_can_start", can_start)
    monkeypatch.setattr(Grammars, "begin", begin)
    core = make_core(small)
    submit_many(core, 100)
    core.submit(request("plain", prompt_of(2, 5), max_tokens=20, ignore_eos=True))
    while core.stats().total_generated_tokens < 20:
        core.step()
    assert set(looks) == {"plain"}
    assert core.stats().num_waiting == 100
    gate.set()
    run(core)
    assert len(begun) == len(compiled) == 100


def test_grammar_that_is_awaited_again_while_it_is_kept_stays(
    small: SmallWorld, gate: threading.Event, compiled: list[str]
) -> None:
    """It is the oldest of those kept, and others end before the next step."""
    gate.set()
    core = make_core(small)
    submit_many(core, 4)
    run(core)
    for number in range(20):
        core.submit(constrained(f"new {number}", f"c{number}"))
        core.submit(constrained(f"old {number}", "a0b*"))
    found = run(core)
    assert len(found) == 40
    assert compiled.count("a0b*") == 1


def test_requests_that_wait_for_one_grammar_all_get_it_or_its_error(
    small: SmallWorld, gate: threading.Event, compiled: list[str]
) -> None:
    core = make_core(small)
    for number in range(3):
        core.submit(constrained(f"fine {number}", "xy"))
        core.submit(constrained(f"bad {number}", "(x"))
    gate.set()
    found = run(core)
    for number in range(3):
        assert found[f"fine {number}"][-1].finish_reason == "stop"
        assert isinstance(found[f"bad {number}"][-1].error, InvalidRequest)
    assert sorted(compiled) == ["(x", "xy"]


def test_requests_without_their_grammar_are_shed_expire_and_end_like_others(
    small: SmallWorld, gate: threading.Event, compiled: list[str]
) -> None:
    core = make_core(small, max_waiting=3, max_wait_seconds=0.2)
    submit_many(core, 4)
    core.end("1", aborted=True)
    assert core.stats().num_waiting == 2
    found = run(core)
    assert list(found) == ["3", "0", "2"]
    assert all(isinstance(emissions[-1].error, EngineOverloaded) for emissions in found.values())
    gate.set()
    while core.is_preparing:
        core.step()
    assert "a1b*" not in compiled[1:]
    assert len(compiled) <= 2


def test_grammars_that_nobody_waits_for_are_not_compiled(small: SmallWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are being compiled; of those behind them one is still wanted when the others' clients have left."""
    gate = threading.Event()
    compiled = spy_on_compiling(monkeypatch, lambda: gate.wait(30))
    core = make_core(small)
    sources = ["aa", "bb", "cc", "dd", "cc", "ee"]
    for number, source in enumerate(sources):
        core.submit(request(str(number), prompt_of(number, 8), grammar=Grammar(kind="regex", source=source)))
    for number in (0, 2, 3, 5):
        core.end(str(number), aborted=True)
    gate.set()
    found = run(core)
    assert sorted(compiled) == ["aa", "bb", "cc"]
    assert {name: one[-1].finish_reason for name, one in found.items()} == {"1": "stop", "4": "stop"}
