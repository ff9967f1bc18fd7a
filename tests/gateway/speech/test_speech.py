"""Answers as models of each family write them: what is told of them, however they are cut into pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.engines.stop_strings import StopStrings
from loraplex.gateway.speech.calls import CallParser
from loraplex.gateway.speech.deltas import CallArguments, CallBegun, Delta, Reasoning, Text
from loraplex.gateway.speech.formats import CALL_FORMATS, call_format
from loraplex.gateway.speech.reasoning import MISTRAL_THINK, THINK, ReasoningParser, reasoning_tags
from loraplex.gateway.speech.speech import Speech

NAMES = frozenset({"weather", "add"})
D_BEGIN, D_CALL, D_SEP, D_END, D_LAST = (
    f"<｜tool▁{word}｜>" for word in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
)
OBJECT = '{"place": "Łódź \\"}{\\\\", "days": [1, {"a": null}]}'


def told(form: str, pieces: list[str]) -> list[tuple[str, str]]:
    """What is said, pieces of one kind joined; ids left out."""
    parser = CallParser(CALL_FORMATS[form], NAMES)
    return joined([*(delta for piece in pieces for delta in parser.feed(piece)), *parser.finish()])


def joined(deltas: list[Delta]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for delta in deltas:
        kind, text = type(delta).__name__, delta.name if isinstance(delta, CallBegun) else delta.text
        if found and found[-1][0] == kind and kind != "CallBegun":
            found[-1] = (kind, found[-1][1] + text)
        else:
            found.append((kind, text))
    return found


def call(name: str, arguments: str) -> list[tuple[str, str]]:
    return [("CallBegun", name), ("CallArguments", arguments)]


def text(said: str) -> list[tuple[str, str]]:
    return [("Text", said)]


ADD = call("add", '{"a": 1}')
WEATHER = call("weather", OBJECT)
CASES: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("hermes", "Just text, 1 < 2 <tool> { } ", text("Just text, 1 < 2 <tool> { } ")),
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": ' + OBJECT + "}\n</tool_call>", WEATHER),
    ("hermes", 'I look. \n<tool_call>{"name":"add","arguments":{"a": 1}}</tool_call>', [*text("I look."), *ADD]),
    (
        "hermes",
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n{"name": "weather", '
        '"arguments": ' + OBJECT + "}\n</tool_call>\n",
        [*ADD, *WEATHER],
    ),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n Done. ', [*ADD, *text("Done. ")]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', ADD),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', ADD),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', call("add", "{}")),
    ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', call("add", "{}")),
    ("hermes", '<tool_call>[{"name": "add", "arguments": {"a": 1}}]</tool_call>', ADD),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}, "id": "x}"}</tool_call>!', [*ADD, *text("!")]),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
     text('<tool_call>{"name": "rm", "arguments": {}}</tool_call>')),
    ("hermes", "a <tool_call>no JSON</tool_call>", text("a <tool_call>no JSON</tool_call>")),
    ("hermes", '<tool_call>{"name": "add", "arguments": [1]}', text('<tool_call>{"name": "add", "arguments": [1]}')),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "un', call("add", '{"a": "un')),
    ("hermes", '<tool_call>{"name": "ad', text('<tool_call>{"name": "ad')),
    ("hermes", " <tool_", text(" <tool_")),
    ("hermes", '<tool_call><tool_call>{"name":"add","arguments":{"a": 1}}</tool_call>', [*text("<tool_call>"), *ADD]),
    ("hermes", '<tool_call>{"name":"add","arguments":{"a": 1}}</tool_call> <tool', [*ADD, *text("<tool")]),
    ("llama3", '{"name": "add", "parameters": {"a": 1}}', ADD),
    ("llama3", '<|python_tag|>{"type": "function", "name": "add", "parameters": {"a": 1}}<|eom_id|>', ADD),
    ("llama3", '{"name": "add", "parameters": {"a": 1}}; {"name": "weather", "parameters": ' + OBJECT + "}",
     [*ADD, *WEATHER]),
    ("llama3", '{"name": "add", "parameters": {"a": 1}}\n\n{"name": "add", "parameters": {"a": 1}}', [*ADD, *ADD]),
    ("llama3", '\n{"parameters": {"a": 1}, "name": "add"}', ADD),
    ("llama3", '{"answer": 1} {"name": "add"}', text('{"answer": 1} {"name": "add"}')),
    ("llama3", 'As JSON: {"name": "add", "parameters": {}}', text('As JSON: {"name": "add", "parameters": {}}')),
    ("llama3", "<|python_tag|>print(1)", text("<|python_tag|>print(1)")),
    ("mistral", '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]', ADD),
    ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "123456789"}, {"name": "weather", '
     '"arguments": ' + OBJECT + "}]", [*ADD, *WEATHER]),
    ("mistral", '[TOOL_CALLS][{"arguments": {"a": 1}, "name": "add"}, {"name": "add", "arguments": {"a": 1}}]',
     [*ADD, *ADD]),
    ("mistral", "See [TOOL_CALLS]weather[ARGS]" + OBJECT + '[TOOL_CALLS]add[CALL_ID]abc[ARGS]{"a": 1}',
     [*text("See"), *WEATHER, *ADD]),
    ("mistral", "[1, 2] and [TOOL_", text("[1, 2] and [TOOL_")),
    ("deepseek", f'{D_BEGIN}{D_CALL}add{D_SEP}{{"a": 1}}{D_END}{D_CALL}weather{D_SEP}{OBJECT}{D_END}{D_LAST}',
     [*ADD, *WEATHER]),
    ("deepseek", f"Hm.\n\n{D_BEGIN}{D_CALL}function{D_SEP}weather\n```json\n{OBJECT}\n```{D_END}\n"
     f'{D_CALL}function{D_SEP}add\n```json\n{{"a": 1}}\n```{D_END}{D_LAST}', [*text("Hm."), *WEATHER, *ADD]),
    ("deepseek", f"{D_BEGIN}{D_CALL}rm{D_SEP}{{}}{D_END}", text(f"{D_BEGIN}{D_CALL}rm{D_SEP}{{}}{D_END}")),
]  # fmt: skip


@pytest.mark.parametrize(("form", "said", "expected"), CASES, ids=[f"{case[0]}: {case[1]}"[:60] for case in CASES])
def test_calls_whole_and_letter_by_letter(form: str, said: str, expected: list[tuple[str, str]]) -> None:
    assert told(form, [said]) == expected
    assert told(form, list(said)) == expected


def test_calls_arguments_are_told_while_they_come() -> None:
    parser = CallParser(CALL_FORMATS["hermes"], NAMES)
    assert parser.feed('<tool_call>\n{"name": "add", "arguments": ') == []
    begun, first = parser.feed('{"a"')
    assert isinstance(begun, CallBegun)
    assert first == CallArguments('{"a"')
    assert parser.feed(": 1") == [CallArguments(": 1")]


# What models write, and what they almost write, cut anywhere and put together anyhow.
FRAGMENTS = [
    "<tool_call>", "</tool_call>", '{"name": "add", "arguments": ', '{"name": "rm", "arguments": ', '{"a": "}"}', "}",
    "{", " ", "\n", "text", "<", "<tool", "[TOOL_CALLS]", "[", "]", ", ", "add", "[ARGS]", "<|python_tag|>", "; ",
    '"', '{"arguments": {}, "name": "add"}', '{"name": "add", "parameters": {"x": 1}}', D_BEGIN, D_CALL, D_SEP, D_END,
    D_LAST, "function", "\n```json\n", "\\",
]  # fmt: skip
SAID = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


def cut(said: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(said) + 1) for place in places} | {len(said)})
    return [said[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("form", sorted(CALL_FORMATS))
@given(said=SAID, places=st.lists(st.integers(0, 400), max_size=12))
def test_calls_any_cut_tells_the_same(form: str, said: str, places: list[int]) -> None:
    whole = told(form, [said])
    assert told(form, cut(said, places)) == whole
    assert told(form, list(said)) == whole


@pytest.mark.parametrize("form", sorted(CALL_FORMATS))
@given(said=SAID)
def test_calls_nothing_is_lost(form: str, said: str) -> None:
    """Without a call every character is told; with calls, all but what writes them."""
    found = told(form, [said])
    if all(kind == "Text" for kind, _ in found):
        assert "".join(said for _, said in found) == said
    for kind, piece in found:
        if kind != "CallBegun":
            assert piece in said or json.loads(piece) is not None
    words = said.count("text")
    assert sum(piece.count("text") for _, piece in found) == words or any(kind == "CallBegun" for kind, _ in found)


REASONED = [
    (False, "<think>\nI think.\n</think>\n\nYes.", "I think.", "Yes."),
    (False, "<think></think> Yes.", "", "Yes."),
    (False, "No tags <think>at the beginning</think>", "", "No tags <think>at the beginning</think>"),
    (False, "<thin air", "", "<thin air"),
    (True, "I think.\n</think>Yes.", "I think.", "Yes."),
    (True, "<think>\nonce more</think>Yes", "once more", "Yes"),
    (True, "without end < / ", "without end < /", ""),
    (True, "a </thi b</think>c</think>", "a </thi b", "c</think>"),
]


def reasoned(is_begun: bool, pieces: list[str]) -> tuple[str, str]:
    parser = ReasoningParser(THINK, is_begun=is_begun)
    found = [*(parser.feed(piece) for piece in pieces), parser.finish()]
    return "".join(reasoning for reasoning, _ in found), "".join(said for _, said in found)


@pytest.mark.parametrize(("is_begun", "said", "reasoning", "answer"), REASONED)
def test_reasoning_is_told_apart(is_begun: bool, said: str, reasoning: str, answer: str) -> None:
    assert reasoned(is_begun, [said]) == (reasoning, answer)
    assert reasoned(is_begun, list(said)) == (reasoning, answer)


@given(
    is_begun=st.booleans(),
    said=st.lists(st.sampled_from(["<think>", "</think>", "<", "</th", " ", "\n", "a", "think"]), max_size=8).map(
        "".join
    ),
    places=st.lists(st.integers(0, 60), max_size=8),
)
def test_reasoning_any_cut_tells_the_same(is_begun: bool, said: str, places: list[int]) -> None:
    assert reasoned(is_begun, cut(said, places)) == reasoned(is_begun, [said]) == reasoned(is_begun, list(said))


def up_to(stop: str, said: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same as far as the first text that holds the stop string."""
    for place, (kind, piece) in enumerate(said):
        if kind == "Text" and stop in piece:
            return [*said[:place], *text(piece[: piece.index(stop)])] if piece.index(stop) else said[:place]
    return said


@pytest.mark.parametrize("form", sorted(CALL_FORMATS))
@given(
    said=SAID, places=st.lists(st.integers(0, 400), max_size=12), stop=st.sampled_from(["text", "}", " ", '"a', "<"])
)
def test_speech_stops_in_text_alone_however_it_is_cut(form: str, said: str, places: list[int], stop: str) -> None:
    expected = up_to(stop, told(form, [said]))
    for pieces in ([said], cut(said, places), list(said)):
        speech = Speech(None, CallParser(CALL_FORMATS[form], NAMES), StopStrings([stop]))
        found = joined([*(delta for piece in pieces for delta in speech.feed(piece)), *speech.finish()])
        assert found == expected
        assert speech.is_stopped == (expected != told(form, [said]))


@pytest.mark.parametrize("form", sorted(CALL_FORMATS))
def test_forced_call_that_is_cut_short_is_told_from_its_arguments_on(form: str) -> None:
    script = CALL_FORMATS[form].script
    whole = script.first + script.begin.replace("%s", '"add"' if '"name"' in script.begin else "add") + '{"a": 1}'
    for end in range(len(whole)):
        parser = CallParser(CALL_FORMATS[form], NAMES, is_forced=True)
        found = joined([*parser.feed(whole[:end]), *parser.finish()])
        assert found == ([] if end <= whole.index('{"a"') else call("add", whole[whole.index('{"a"') : end]))


@pytest.mark.parametrize("said", ["<thi", "<think>Hm", "<think>Hm.</think>\n", "<think>Hm.</think>\n<tool_"])
def test_forced_answer_that_is_cut_short_within_its_tags_has_no_text(said: str) -> None:
    calls = CallParser(CALL_FORMATS["hermes"], NAMES, is_forced=True)
    speech = Speech(ReasoningParser(THINK, is_begun=False), calls)
    found = joined([*(delta for letter in said for delta in speech.feed(letter)), *speech.finish()])
    assert [kind for kind, _ in found] == (["Reasoning"] if "Hm" in said else [])


def test_speech_reasons_then_speaks_then_calls() -> None:
    speech = Speech(ReasoningParser(THINK, is_begun=True), CallParser(CALL_FORMATS["hermes"], NAMES))
    said = 'Add them.</think>\n\nSum:\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    deltas: list[Delta] = []
    for letter in said:
        was_reasoning = speech.is_reasoning
        found = speech.feed(letter)
        assert was_reasoning or not any(isinstance(delta, Reasoning) for delta in found)
        deltas += found
    deltas += speech.finish()
    assert joined(deltas) == [("Reasoning", "Add them."), ("Text", "Sum:"), *ADD]


def test_speech_of_an_answer_that_ends_early() -> None:
    for parser, expected in ((ReasoningParser(THINK, is_begun=True), Reasoning("a <")), (None, Text("a <"))):
        speech = Speech(parser, CallParser(CALL_FORMATS["hermes"], NAMES))
        assert joined([*speech.feed("a <"), *speech.finish()]) == joined([expected])


@pytest.mark.parametrize(
    ("template", "form", "tags"),
    [
        (None, "hermes", None),
        ("{{ messages }}", "hermes", None),
        ("... <tool_call> ... content.split('</think>')", "hermes", THINK),
        ("... <|python_tag|>", "llama3", None),
        ("[AVAILABLE_TOOLS] ... [TOOL_CALLS]", "mistral", None),
        ("[TOOL_CALLS] ... [ARGS] [THINK]", "mistral_args", MISTRAL_THINK),
        (f"{D_BEGIN} ... </think>", "deepseek", THINK),
        (f"{D_BEGIN} ... ```json", "deepseek_fenced", None),
    ],
)
def test_formats_are_chosen_by_the_template(template: str | None, form: str, tags: Any) -> None:
    assert call_format("auto", template).name == form
    assert reasoning_tags("auto", template) == tags
    assert call_format("llama3", template).name == "llama3"
    assert reasoning_tags("none", template) is None
    assert reasoning_tags("think", template) == THINK


def test_ids_are_what_templates_accept() -> None:
    assert CALL_FORMATS["hermes"].new_id().startswith("call_")
    short = CALL_FORMATS["mistral"].new_id()
    assert (len(short), short.isalnum()) == (9, True)
