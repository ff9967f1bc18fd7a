"""An answer's way through its grammar: what it may cost, where it may end, how many choices it may have."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
from support.core import make_core, prompt_of, request, run, tokens
from support.grammars import END, begin, ids_of, json_request, text_of
from support.json_schemas import SCHEMAS
from support.worlds import SmallWorld

from loraplex.engines.errors import InvalidRequest
from loraplex.engines.native import grammar as grammar_module
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.grammar import Constraint, Grammars
from loraplex.engines.protocol import Grammar


@pytest.fixture(scope="module")
def core(small: SmallWorld) -> EngineCore:
    return make_core(small)


AMBIGUOUS = ['s: s s | "a" | "b" |', "s: s s s | s s | /[a-z ]/ "]


@pytest.mark.parametrize("rule", AMBIGUOUS, ids=["halves", "thirds"])
def test_ambiguous_grammar_is_given_up_once_it_costs_too_much(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    monkeypatch.setattr(grammar_module, "_MAX_SECONDS", 0.2)
    core.submit(request("a", prompt_of(1, 5), max_tokens=2000, logit_bias={END: -100.0}, temperature=1.0, seed=1,
                        grammar=Grammar(kind="lark", source=f"start: s\n{rule}")))  # fmt: skip
    core.submit(json_request("b", SCHEMAS["tool-call"]))
    emissions = run(core)
    error = emissions["a"][-1].error
    assert isinstance(error, InvalidRequest)
    assert error.param == "grammar"
    assert re.search("more than 0.2 s to find what may come next|Too many items", str(error)), str(error)
    assert emissions["b"][-1].finish_reason == "stop"


def test_time_for_a_grammar_comes_back_with_its_tokens(small: SmallWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10_000))
    monkeypatch.setattr(grammar_module, "time", SimpleNamespace(thread_time=lambda: next(ticks) * 0.001))
    grammars, [a] = Grammars(small.directory, 320, frozenset([END])), ids_of("a")
    patient = begin(grammars, "[ab]*")
    for _ in range(1000):  # 2 ms each, of 5
        patient.masks(())
        patient.consume(a)
    monkeypatch.setattr(grammar_module, "time", SimpleNamespace(thread_time=lambda: next(ticks) * 0.006))
    slow = begin(grammars, "[ab]*")

    def follow() -> None:
        for _ in range(200):  # 12 ms each
            slow.masks(())
            slow.consume(a)

    with pytest.raises(InvalidRequest, match="more than 1 s"):
        follow()


def test_own_ends_stand_where_the_bases_do(small: SmallWorld) -> None:
    grammars, [a] = Grammars(small.directory, 320, frozenset([END])), ids_of("a")
    grammar = Grammar(kind="regex", source="aa?b?")
    begin(grammars, grammar.source)
    plain, own = grammars.constraint(grammar), grammars.constraint(grammar, (5, 300))

    def admitted(constraint: Constraint) -> list[set[int]]:
        masks = constraint.masks((a, a))
        return [{token for token in range(320) if mask[token // 8] >> token % 8 & 1} for mask in masks]

    before = admitted(plain)
    assert [END in mask for mask in before] == [False, True, True]
    assert admitted(own) == [before[0], before[1] | {5, 300}, before[2] | {5, 300}]


def test_answer_ends_with_an_own_end_where_its_grammar_may(core: EngineCore) -> None:
    grammar = Grammar(kind="regex", source="[ab]{3,9}")
    options: dict[str, Any] = {"grammar": grammar, "logit_bias": {END: -100.0, 300: 100.0}, "max_tokens": 50}
    core.submit(request("own", prompt_of(1, 5), end_token_ids=(300,), **options))
    core.submit(request("other", prompt_of(1, 5), **options))
    emissions = run(core)
    assert tokens(emissions["own"])[-1] == 300
    assert re.fullmatch("[ab]{3}", text_of(emissions["own"][:-1]))
    assert re.fullmatch("[ab]{9}", text_of(emissions["other"]))
    assert {emissions[name][-1].finish_reason for name in ("own", "other")} == {"stop"}


def test_one_of_very_many_choices(core: EngineCore) -> None:
    choices = [f"label-{number:05d}" for number in range(10_000)] + ["\x7f", "\x00 \u2028"]
    core.submit(request("a", prompt_of(1, 5), grammar=Grammar(kind="choice", source=json.dumps(choices))))
    odd = Grammar(kind="choice", source=json.dumps(["\x7f"]))
    core.submit(request("b", prompt_of(1, 5), grammar=odd))
    emissions = run(core)
    assert text_of(emissions["a"]) in choices
    assert text_of(emissions["b"]) == "\x7f"
