"""Grammars of calls against llguidance itself, over tokenizers that have each family's marks as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llguidance import LLTokenizer
from tokenizers import AddedToken, Tokenizer

from loraplex.config.demo import MODEL_DIR
from loraplex.engines.matching import match
from loraplex.engines.protocol import Grammar
from loraplex.engines.tokenizer import HubTokenizer
from loraplex.gateway.speech.call_grammars import CallableTool, Thinking, call_grammar, reasoned
from loraplex.gateway.speech.calls import CallParser
from loraplex.gateway.speech.deltas import CallArguments, CallBegun
from loraplex.gateway.speech.formats import CALL_FORMATS
from loraplex.gateway.speech.reasoning import THINK

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/number"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"number": {"type": "integer"}},
}
TOOLS = [CallableTool("add", SCHEMA), CallableTool("now", {"additionalProperties": False})]
MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", *(
    f"<｜tool▁{word}｜>" for word in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
)]  # fmt: skip
# One call each, as the family writes it: of `add`, of `now`.
CALLS = {
    "hermes": ['<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
               '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'],
    "llama3": ['{"name": "add", "parameters": {"a": 1}}', '{"name": "now", "parameters": {}}'],
    "mistral": ['{"name": "add", "arguments": {"a": 1}}', '{"name": "now", "arguments": {}}'],
    "mistral_args": ['[TOOL_CALLS]add[ARGS]{"a": 1}', "[TOOL_CALLS]now[ARGS]{}"],
    "deepseek": ['<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>',
                 "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"],
    "deepseek_fenced": ['<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>',
                        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"],
}  # fmt: skip
AROUND = {
    "hermes": ("", "\n", ""),
    "llama3": ("", "; ", ""),
    "mistral": ("[TOOL_CALLS][", ", ", "]"),
    "mistral_args": ("", "", ""),
    "deepseek": ("<｜tool▁calls▁begin｜>", "", "<｜tool▁calls▁end｜>"),
    "deepseek_fenced": ("<｜tool▁calls▁begin｜>", "\n", "<｜tool▁calls▁end｜>"),
}
FORMS = sorted(CALLS)


class World:
    """A tokenizer of files, ours and llguidance's."""

    def __init__(self, directory: Path) -> None:
        self.ours = HubTokenizer(directory)
        self.theirs = LLTokenizer(str(directory / "tokenizer.json"))

    def admits(self, grammar: Grammar | None, text: str) -> bool:
        """Whether the text, as the model's tokens, is a whole answer."""
        assert grammar is not None
        matcher = match(grammar, self.theirs)
        ids = self.ours.encode(text, add_special_tokens=False)
        if matcher.validate_tokens(ids) < len(ids):
            return False
        return bool(not ids or matcher.consume_tokens(ids)) and matcher.is_accepting()


@pytest.fixture(scope="module", params=["special", "added", "spelt"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The demo's tokenizer, to which the marks are special tokens, plain ones, or no tokens."""
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    if request.param == "special":
        tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    elif request.param == "added":
        tokenizer.add_tokens([AddedToken(mark, special=False) for mark in MARKS])
    directory = tmp_path_factory.mktemp(request.param)
    tokenizer.save(str(directory / "tokenizer.json"))
    return World(directory)


def said(form: str, *numbers: int) -> str:
    first, joint, last = AROUND[form]
    return first + joint.join(CALLS[form][number] for number in numbers) + last


def called(form: str, text: str) -> list[tuple[str, str]]:
    parser = CallParser(CALL_FORMATS[form], {"add", "now"})
    deltas = [*parser.feed(text), *parser.finish()]
    names = [delta.name for delta in deltas if isinstance(delta, CallBegun)]
    return list(zip(names, [delta.text for delta in deltas if isinstance(delta, CallArguments)], strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_parallel", [True, False])
def test_forced_answer_is_calls_that_keep_their_schemas(world: World, form: str, is_parallel: bool) -> None:
    grammar = call_grammar(CALL_FORMATS[form], TOOLS, world.ours, None, is_forced=True, is_parallel=is_parallel)
    for numbers in ((0,), (1,)):
        assert world.admits(grammar, said(form, *numbers))
        assert len(called(form, said(form, *numbers))) == 1
    assert world.admits(grammar, said(form, 0, 1, 0)) == is_parallel
    assert called(form, said(form, 0, 1)) == [("add", '{"a": 1}'), ("now", "{}")]
    for wrong in (
        "",
        "no call",
        said(form, 0).replace("1", '"x"'),
        said(form, 0).replace("add", "rm"),
        said(form, 0)[:-1],
    ):
        assert not world.admits(grammar, wrong), wrong


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_parallel", [True, False])
def test_free_answer_is_text_or_calls_that_keep_their_schemas(world: World, form: str, is_parallel: bool) -> None:
    grammar = call_grammar(CALL_FORMATS[form], TOOLS, world.ours, None, is_forced=False, is_parallel=is_parallel)
    for right in ("", "plain text", "1 < 2 [3] \n{", said(form, 0)):
        assert world.admits(grammar, right), right
    if form != "llama3":  # whose calls stand at an answer's beginning alone
        assert world.admits(grammar, "I look.\n" + said(form, 1))
    assert world.admits(grammar, said(form, 0, 1)) == is_parallel
    assert not world.admits(grammar, said(form, 0).replace("1", '"x"'))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_begun", [True, False])
def test_reasoning_comes_first(world: World, form: str, is_begun: bool) -> None:
    grammar = call_grammar(
        CALL_FORMATS[form], TOOLS, world.ours, Thinking(THINK, is_begun), is_forced=True, is_parallel=True
    )
    thought = ("" if is_begun else "<think>") + "\nHm, {.\n</think>\n\n"
    assert world.admits(grammar, thought + said(form, 0))
    assert world.admits(grammar, said(form, 0)) != is_begun
    assert not world.admits(grammar, thought + "no call")


@pytest.mark.parametrize("form", FORMS)
def test_answer_may_have_a_form_beside_calls(world: World, form: str) -> None:
    schema = Grammar(
        kind="json_schema", source='{"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}'
    )
    for otherwise, right in ((schema, '{"b": true}'), (Grammar(kind="regex", source="[a-z/]+"), "a/b")):
        grammar = call_grammar(
            CALL_FORMATS[form], TOOLS, world.ours, None, is_forced=False, is_parallel=True, otherwise=otherwise
        )
        if form == "llama3":
            assert grammar is None
            continue
        assert world.admits(grammar, right)
        assert world.admits(grammar, said(form, 0))
        assert not world.admits(grammar, "Plain text!")
    lark = Grammar(kind="lark", source='start: "x"')
    assert call_grammar(
        CALL_FORMATS[form], TOOLS, world.ours, None, is_forced=False, is_parallel=True, otherwise=lark
    ) is None  # fmt: skip


def test_form_of_an_answer_is_kept_behind_its_reasoning(world: World) -> None:
    for grammar, right, wrong in (
        (Grammar(kind="json_schema", source='{"type": "integer"}'), "12", "x"),
        (Grammar(kind="regex", source=r"a\/b|c/d"), "c/d", "e"),
        (Grammar(kind="choice", source='["yes", "nö"]'), "nö", "no"),
    ):
        held = reasoned(grammar, Thinking(THINK, True), world.ours)
        assert world.admits(held, "Hm.</think>\n\n" + right)
        assert not world.admits(held, "Hm.</think>\n\n" + wrong)
        assert not world.admits(held, right)
    lark = Grammar(kind="lark", source='start: "x"')
    assert reasoned(lark, Thinking(THINK, True), world.ours) is None
    assert reasoned(lark, Thinking(THINK, False), world.ours) == lark
