"""Constrained answers: what comes is of the grammar, whatever the model would say; a bad grammar harms nobody else."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.core import make_core, prompt_of, request, run, tokens
from support.grammars import END, begin, ids_of, json_request, spy_on_compiling, text_of
from support.json_schemas import SCHEMAS
from support.models import make_tokenizer
from support.worlds import SmallWorld
from tokenizers import Tokenizer, models

from loraplex.engines.errors import InvalidRequest
from loraplex.engines.native import grammar as grammar_module
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.grammar import Grammars
from loraplex.engines.protocol import Grammar

ARITHMETIC_LARK = """
start: sum
sum: product ("+" product)~0..3
product: NUMBER ("*" NUMBER)~0..2
NUMBER: /[1-9][0-9]{0,2}/
"""
ARITHMETIC_GBNF = """
root ::= number (op number)?
op ::= "+" | "-"
number ::= [0-9] [0-9]?
"""


@pytest.fixture(scope="module")
def core(small: SmallWorld) -> EngineCore:
    return make_core(small)


def test_answers_to_fifty_schemas_at_once_are_of_their_schemas(core: EngineCore, small: SmallWorld) -> None:
    """jsonschema decides, formats included. All in one batch with adapters, twice with different seeds."""
    assert len(SCHEMAS) == 50
    adapters = [None, *small.adapters.values()]
    for seed in (1, 2):
        for number, (name, schema) in enumerate(SCHEMAS.items()):
            wanted = json_request(name, schema, seed=seed)
            core.submit(type(wanted)(**{**_fields(wanted), "adapter": adapters[number % len(adapters)]}))
        emissions = run(core, seconds=100)
        for name, schema in SCHEMAS.items():
            assert emissions[name][-1].error is None, (name, emissions[name][-1].error)
            assert emissions[name][-1].finish_reason == "stop", (name, text_of(emissions[name]))
            validator = jsonschema.Draft202012Validator(
                schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
            )
            validator.validate(json.loads(text_of(emissions[name])))
    assert core.blocks.num_used == 0


def _fields(message: Any) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__struct_fields__}


@pytest.mark.parametrize(
    ("kind", "source", "form"),
    [
        ("regex", r"[a-f]{3}-(one|two)", r"[a-f]{3}-(one|two)"),
        ("choice", json.dumps(["yes", "no", "per\"haps"]), r"yes|no|per\"haps"),
        ("lark", ARITHMETIC_LARK, r"[1-9]\d{0,2}([+*][1-9]\d{0,2})*"),
        ("gbnf", ARITHMETIC_GBNF, r"\d\d?([+-]\d\d?)?"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answer_has_the_form(core: EngineCore, kind: Any, source: str, form: str, temperature: float) -> None:
    for seed in range(4):
        grammar = Grammar(kind=kind, source=source)
        core.submit(
            request(str(seed), prompt_of(seed, 5), temperature=temperature, seed=seed, grammar=grammar, max_tokens=80)
        )
        core.submit(request(f"plain-{seed}", prompt_of(seed, 5)))
    emissions = run(core)
    for seed in range(4):
        assert re.fullmatch(form, text_of(emissions[str(seed)])), text_of(emissions[str(seed)])
        assert emissions[str(seed)][-1].finish_reason == "stop"
        assert len(tokens(emissions[f"plain-{seed}"])) > 0


def test_forced_tokens_are_drafted_and_change_nothing(small: SmallWorld) -> None:
    schema = SCHEMAS["tool-call"]
    answers, steps = [], []
    for max_draft_tokens in (0, 8):
        core = make_core(small, max_draft_tokens=max_draft_tokens)
        core.submit(json_request("a", schema))
        answers.append(tokens(run(core)["a"]))
        steps.append(core.stats().num_steps)
    assert answers[0] == answers[1]
    assert steps[1] < steps[0] / 2


def test_drafts_beyond_the_grammars_end_leave_its_place(small: SmallWorld) -> None:
    constraint = begin(Grammars(small.directory, 320, frozenset([END])), "[0-9]{3}")
    four, two, one = ids_of("421")
    constraint.consume(four)
    before = constraint.masks(())
    drafts = [two, one, END, END]
    assert constraint.num_admitted(drafts[:3]) == 3
    assert len(constraint.masks(drafts)) == 5
    assert constraint.masks(()) == before
    for token in (two, one):
        assert not constraint.is_over
        constraint.consume(token)
    assert constraint.is_over


def test_refused_drafts_beyond_the_grammars_end_change_nothing(small: SmallWorld) -> None:
    """Whichever digit comes first, the prompt says what followed it and the end; another digit follows instead."""
    prompt = [token for digit in "123456789" for token in (*ids_of(f"x{digit}00"), END)] + ids_of("x")
    grammar, [zero] = Grammar(kind="regex", source="[0-9]{3}"), ids_of("0")
    answers = []
    for max_draft_tokens in (0, 8):
        core = make_core(small, max_draft_tokens=max_draft_tokens)
        core.submit(request("a", prompt, grammar=grammar, logit_bias={zero: -100.0}))
        emissions = run(core)["a"]
        assert emissions[-1].error is None
        assert re.fullmatch("[1-9]{3}", text_of(emissions)), text_of(emissions)
        answers.append(tokens(emissions))
    assert answers[0] == answers[1]
    assert core.stats().total_draft_tokens > 0


def test_answer_that_ends_only_where_the_grammar_does_ignores_the_end_token(core: EngineCore) -> None:
    """Neither `ignore_eos` nor `min_tokens` leads beyond the grammar's end, and either as far as that."""
    grammar, pairs = Grammar(kind="regex", source="abc"), Grammar(kind="regex", source="(ab){0,20}")
    ends_soon = {END: 50.0}
    core.submit(request("a", prompt_of(1, 5), grammar=grammar, ignore_eos=True, min_tokens=10))
    core.submit(request("b", prompt_of(1, 5), grammar=pairs, logit_bias=ends_soon))
    core.submit(request("c", prompt_of(1, 5), grammar=pairs, logit_bias=ends_soon, min_tokens=3))
    core.submit(request("d", prompt_of(1, 5), grammar=pairs, logit_bias=ends_soon, ignore_eos=True, max_tokens=100))
    emissions = run(core)
    assert [text_of(emissions[name]) for name in "abcd"] == ["abc", "", "abab", "ab" * 20]


def test_preempted_answer_keeps_its_place_in_the_grammar(small: SmallWorld) -> None:
    core = make_core(small, kv_cache_bytes=20 * 4 * 3 * 2 * 32 * 4, max_batch_tokens=20)
    grammar = Grammar(kind="regex", source="([a-d][0-9]){12}")
    for number in range(6):
        core.submit(request(str(number), prompt_of(number, 18), grammar=grammar, temperature=1.0, max_tokens=40))
    emissions = run(core)
    assert core.stats().total_preemptions > 0
    for number in range(6):
        assert re.fullmatch("([a-d][0-9]){12}", text_of(emissions[str(number)]))


@pytest.mark.parametrize(
    ("kind", "source", "says"),
    [
        ("json_schema", "{", "json schema"),
        ("json_schema", '{"type": "objekt"}', "objekt"),
        ("json_schema", '{"$ref": "#/$defs/none"}', "none"),
        ("json_schema", '{"type": "integer", "minimum": 3, "maximum": 2}', "json schema"),
        ("regex", "(a", "unclosed group"),
        ("regex", "a(?=b)", "look-around"),
        ("json_schema", "[1]", "a schema is an object"),
        ("json_schema", "false", "a schema is an object"),
        ("json_schema", '{"oneOf": [{"type": "string"}, {"maxLength": 3}]}', "not supported"),
        ("choice", "[]", "choices"),
        ("choice", '["a", 1]', "choices"),
        ("choice", '"a"', "choices"),
        ("lark", "start: missing", "missing"),
        ("lark", "no start", "lark"),
        ("gbnf", "root ::= (", "gbnf"),
        ("gbnf", "root ::= other", "other"),
    ],
)
def test_bad_grammar_is_its_requests_error_alone(core: EngineCore, kind: Any, source: str, says: str) -> None:
    core.submit(request("bad", prompt_of(1, 5), grammar=Grammar(kind=kind, source=source)))
    core.submit(request("fine", prompt_of(2, 5)))
    emissions = run(core)
    error = emissions["bad"][-1].error
    assert isinstance(error, InvalidRequest)
    assert error.param == "grammar"
    assert "cannot be used" in str(error)
    assert says in str(error)
    assert "option" not in str(error)  # which only llguidance's callers have
    assert tokens(emissions["fine"])
    assert core.blocks.num_used == 0


def test_grammar_that_nothing_can_follow_fails_alone(core: EngineCore) -> None:
    letters = {make_tokenizer().convert_tokens_to_ids(letter) for letter in "ab"}
    words = tuple((letter,) for letter in letters)
    core.submit(request("a", prompt_of(1, 5), grammar=Grammar(kind="regex", source="[ab]+"), bad_words_ids=words))
    core.submit(request("b", prompt_of(2, 5)))
    emissions = run(core)
    error = emissions["a"][-1].error
    assert isinstance(error, InvalidRequest)
    assert error.param == "grammar"
    assert "nothing can follow" in str(error)
    assert tokens(emissions["b"])


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "a{1000000}"),
        ("lark", 'start: "a" start'),
        ("json_schema", json.dumps({"type": "string", "pattern": "^a{1000000}$"})),
    ],
)
@pytest.mark.parametrize("max_draft_tokens", [0, 8])
def test_grammar_that_breaks_while_it_is_followed_fails_alone(
    small: SmallWorld, kind: Any, source: str, max_draft_tokens: int
) -> None:
    core = make_core(small, max_draft_tokens=max_draft_tokens)
    core.submit(request("a", prompt_of(1, 5), grammar=Grammar(kind=kind, source=source), max_tokens=100))
    core.submit(request("b", prompt_of(2, 5)))
    emissions = run(core)
    last = emissions["a"][-1]
    assert last.finish_reason is None
    assert isinstance(last.error, InvalidRequest)
    assert last.error.param == "grammar"
    assert "cannot be followed any further" in str(last.error)
    assert emissions["b"][-1].finish_reason is not None
    assert core.blocks.num_used == 0


def test_compiled_grammar_is_kept_and_old_ones_leave(small: SmallWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = spy_on_compiling(monkeypatch)
    grammars = Grammars(small.directory, 320, frozenset([257]))
    one = begin(grammars, "a0")
    for number in range(1, 300):
        begin(grammars, f"a{number}")
        other = begin(grammars, "a0")
    begin(grammars, "a299")
    assert compiled == [f"a{number}" for number in range(300)]
    begin(grammars, "a1")
    assert compiled.pop() == "a1"
    assert len(grammars._kept) == 256
    one.consume(one.forced()[0])
    assert one.masks(()) != other.masks(())


def test_grammars_are_kept_as_far_as_their_characters_go(small: SmallWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest stays whatever its size."""
    monkeypatch.setattr(grammar_module, "_MAX_KEPT_CHARACTERS", 6)
    compiled = spy_on_compiling(monkeypatch)
    grammars = Grammars(small.directory, 320, frozenset([257]))
    for source in ("aaa", "bbb", "aaa", "cc", "aaa", "ccccccc", "ccccccc", "aaa"):
        begin(grammars, source)
    assert compiled == ["aaa", "bbb", "cc", "ccccccc", "aaa"]


def test_model_without_tokenizer_json_refuses_grammars(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="reads no tokenizer there"):
        begin(Grammars(tmp_path, 320, frozenset([END])), "a")


def test_tokens_beyond_the_models_vocabulary_are_never_forced(small: SmallWorld) -> None:
    """The tokenizer's byte for a space is its token 220."""
    constraint = begin(Grammars(small.directory, 200, frozenset([END])), "ab c")
    assert constraint.forced() == ids_of("ab")


def with_tokenizer(small: SmallWorld, directory: Path, tokenizer: Tokenizer) -> SmallWorld:
    """The same base, with another tokenizer.json."""
    shutil.copytree(small.directory, directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return dataclasses.replace(small, directory=directory)


def test_tokenizer_with_more_tokens_than_the_model_serves_grammars(small: SmallWorld, tmp_path: Path) -> None:
    tokenizer = make_tokenizer().backend_tokenizer
    tokenizer.add_tokens([f"<|more-{number}|>" for number in range(100)])
    core = make_core(with_tokenizer(small, tmp_path / "base", tokenizer))
    core.submit(request("a", prompt_of(1, 5), grammar=Grammar(kind="regex", source="[a-f]{3}-(one|two)")))
    core.submit(request("b", prompt_of(2, 5)))
    emissions = run(core)
    assert re.fullmatch("[a-f]{3}-(one|two)", text_of(emissions["a"])), emissions["a"]
    assert tokens(emissions["b"])


def test_tokenizer_that_grammars_cannot_take_is_their_requests_error_alone(small: SmallWorld, tmp_path: Path) -> None:
    words = models.WordLevel({f"w{number}": number for number in range(320)}, unk_token="w0")
    core = make_core(with_tokenizer(small, tmp_path / "base", Tokenizer(words)))
    for name in ("first", "second"):
        core.submit(request(name, prompt_of(1, 5), grammar=Grammar(kind="regex", source=f"{name}[ab]+")))
    core.submit(request("fine", prompt_of(2, 5)))
    emissions = run(core)
    for name in ("first", "second"):
        error = emissions[name][-1].error
        assert isinstance(error, InvalidRequest)
        assert error.param == "grammar"
        assert "grammars are not served for this model" in str(error)
    assert emissions["fine"][-1].finish_reason is not None
    assert core.blocks.num_used == 0


def test_grammar_that_would_end_the_process_is_its_requests_error_alone(small: SmallWorld) -> None:
    """Definitions that name one another, five thousand of them: llguidance follows them until the stack is gone."""
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**links, "d5000": {"type": "object"}}}
    core = make_core(small)
    core.submit(request("neighbour", prompt_of(1, 8), max_tokens=40, ignore_eos=True))
    core.submit(request("hostile", prompt_of(2, 8), grammar=Grammar(kind="json_schema", source=json.dumps(schema))))
    found = run(core)
    assert len(tokens(found["neighbour"])) == 40
    error = found["hostile"][-1].error
    assert isinstance(error, InvalidRequest)
    assert "go too deep" in str(error)
