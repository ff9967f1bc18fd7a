"""Large grammars are compiled where nothing else is: what breaks a compiler is refused, and what does not is taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from loraplex.engines.errors import InvalidRequest
from loraplex.engines.grammar_trial import GrammarTrial
from loraplex.engines.matching import MAX_SOURCE_CHARACTERS
from loraplex.engines.protocol import Grammar


@pytest.fixture(scope="module")
def trial() -> Iterator[GrammarTrial]:
    made = GrammarTrial()
    yield made
    made.close()


def chain(num_links: int, link: dict[str, Any] | str, last: Any) -> Grammar:
    """A schema whose definitions name one another in turn; `NEXT` stands for the next one's name."""
    text = json.dumps(link)
    links = {f"d{i}": json.loads(text.replace("NEXT", f"#/$defs/d{i + 1}")) for i in range(num_links)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**links, f"d{num_links}": last}}
    return Grammar(kind="json_schema", source=json.dumps(schema))


def rules(num_links: int, rule: str) -> Grammar:
    lines = ["start: " + rule.format(0), *(f"{rule.format(i)}: {rule.format(i + 1)}" for i in range(num_links))]
    return Grammar(kind="lark", source="\n".join([*lines, f'{rule.format(num_links)}: "b"']))


BREAKING = [
    chain(5000, {"$ref": "NEXT"}, {"type": "object"}),
    chain(2000, {"type": "object", "properties": {"a": {"$ref": "NEXT"}}}, {"type": "string"}),
    chain(3000, {"allOf": [{"$ref": "NEXT"}]}, {"type": "string"}),
    rules(15000, "r{}"),
    rules(10000, "T{}"),
]


@pytest.mark.parametrize("grammar", BREAKING, ids=["ref", "properties", "allOf", "rules", "terminals"])
def test_chains_that_break_the_compiler_are_refused(trial: GrammarTrial, grammar: Grammar) -> None:
    """Each ends a process that compiles it in a thread of usual size, or keeps it busy for minutes."""
    assert len(grammar.source) <= MAX_SOURCE_CHARACTERS
    with pytest.raises(
        InvalidRequest, match=r"cannot be used: its rules go too deep, or it takes more than"
    ) as refused:
        trial.check(grammar)
    assert refused.value.param == "grammar"
    trial.check(rules(600, "r{}"))  # there is a new process


def test_large_grammars_of_usual_depth_are_taken(trial: GrammarTrial) -> None:
    properties = {f"p{i}": {"type": "string", "description": "d" * 200} for i in range(300)}
    schema = {"type": "object", "properties": {"all": {"type": "object", "properties": properties}}}
    trial.check(Grammar(kind="json_schema", source=json.dumps(schema)))
    trial.check(Grammar(kind="choice", source=json.dumps([f"choice number {i}" for i in range(2000)])))
    trial.check(chain(100, {"type": "object", "properties": {"a": {"$ref": "NEXT"}}}, {"type": "string"}))


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar(kind="lark", source="start: " + "(" * 5000), "lark cannot be used"),
        (Grammar(kind="regex", source="[ab" * 2000), "regex cannot be used"),
        (Grammar(kind="choice", source=json.dumps(["x" * 5000, 3])), "the choices must be strings"),
    ],
    ids=["lark", "regex", "choice"],
)
def test_what_cannot_be_compiled_is_told_why(trial: GrammarTrial, grammar: Grammar, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        trial.check(grammar)


def test_grammar_whose_tokens_take_long_to_find_is_refused(trial: GrammarTrial) -> None:
    with pytest.raises(InvalidRequest, match=r"takes \d+ ms a token to find"):
        trial.check(Grammar(kind="regex", source="a{1000}b" * 4000))


def test_small_grammars_need_no_process() -> None:
    trial = GrammarTrial()
    trial.check(Grammar(kind="lark", source="start: ("))  # whoever compiles it refuses it
    assert trial._processes[0]._process is None
