"""What an answer may say where its tool calls must be right: the family's own way to call, as a Lark grammar.

Arguments are held to the tools' schemas. A forced answer is calls and nothing else, but for the reasoning before them;
a free one is any text, and a call in it is one of these.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from loraplex.engines.protocol import Grammar
from loraplex.gateway.speech.formats import CallFormat
from loraplex.gateway.speech.reasoning import ReasoningTags

_MARKER = re.compile(r"(<[^<>\s]{1,40}>|\[/?[A-Z_]{1,20}\])")
# What a model may print JSON with; left to itself it may add white space for ever.
_GUIDANCE = {"whitespace_pattern": r"( |\n[ \t]{0,32})?"}
# Of a schema that need not be kept to the letter, what no grammar can say is left out.
LENIENT: dict[str, Any] = {"lenient": True, "coerce_one_of": True}
_COMPLAINT = re.compile(r"at (?P<line>\d+)\(\d+\): (?:failed to compile JSON schema: )?(?P<reason>.*?)(?: \d+ \| .*)?")
_TEXT = "TEXT: /(.|\\n)*/\nSPACE: /[ \\n]{0,4}/\n"


class Vocabulary(Protocol):
    """As much of a tokenizer as grammars need."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


class CallableTool(NamedTuple):
    """A tool that may be called, and the JSON schema of its arguments; None asks for any object.

    One that is not strict need be kept only as far as a grammar can say it.
    """

    name: str
    schema: dict[str, Any] | None
    is_strict: bool = True


class Thinking(NamedTuple):
    """The tags of a model that reasons; `is_begun` where the prompt holds the first one."""

    tags: ReasoningTags
    is_begun: bool


def call_grammar(
    form: CallFormat,
    tools: Sequence[CallableTool],
    vocabulary: Vocabulary,
    thinking: Thinking | None,
    *,
    is_forced: bool,
    is_parallel: bool,
    otherwise: Grammar | None = None,
) -> Grammar | None:
    """The grammar of an answer that calls one of these tools, or several where calls may be parallel.

    Where no call is forced the answer may be any text, or one that `otherwise` admits; None where that cannot be part
    of a grammar of this family's calls.
    """
    writer = _Writer(vocabulary)
    think = writer.thinking(thinking)
    opening = ""
    rest = ""
    if is_forced:
        start = f"start: {think} calls\n"
    elif otherwise is not None:
        # where calls begin like any JSON the lexer, which reads the longest word, could not tell them from other JSON
        try:
            body = None if form.opens_answer else _body(otherwise)
        except (ValueError, RecursionError):
            return otherwise  # the engine says what is wrong with it
        if body is None:
            return None
        start, rest = f"start: {think} (calls | body)\n", body
    elif form.opens_answer:
        start = f"start: {think} (calls | OTHER)\n"
        rest = 'OTHER: /(.|\\n)*/ & ~/\\s*\\{\\s*"(name|type|parameters|arguments)"(.|\\n)*/\n'
    else:
        opening = form.openings[0]
        start = f"start: {think} " + ("(trigger calls)* TEXT\n" if is_parallel else "(trigger calls | TEXT)\n")
        rest = writer.trigger("trigger", opening)
    rules = _calls(form, writer, len(tools), is_parallel=is_parallel, without=opening)
    bodies = "".join(_tool(form, writer, number, tool, rules) for number, tool in enumerate(tools))
    return Grammar(kind="lark", source=start + rest + rules + bodies + writer.rules + _TEXT)


def _calls(form: CallFormat, writer: "_Writer", num_tools: int, *, is_parallel: bool, without: str) -> str:
    """One call or several, `without` the opening that a trigger has written."""
    script = form.script
    one_of = " | ".join(f"tool_{number}" for number in range(num_tools))
    more = f"({writer.literal(script.joint)} call)*" if is_parallel else ""
    if script.first:
        first = writer.literal(script.first.removeprefix(without))
        return f"calls: {first} call {more} {writer.literal(script.last)}\ncall: {one_of}\n"
    bare = " | ".join(f"bare_{number}" for number in range(num_tools)) if without else one_of
    return f"calls: ({bare}) {'' if without else more} {writer.literal(script.last)}\ncall: {one_of}\n"


def _tool(form: CallFormat, writer: "_Writer", number: int, tool: CallableTool, used: str) -> str:
    begin = form.script.begin.replace("%s", _quoted(form.script.begin, tool.name))
    end = writer.literal(form.script.end)
    guidance = _GUIDANCE if tool.is_strict else {**_GUIDANCE, **LENIENT}
    schema = {"type": "object", **(tool.schema or {}), "x-guidance": guidance}
    rules = f"args_{number}: %json {json.dumps(schema, ensure_ascii=False)}\n"
    rules += f"tool_{number}: {writer.literal(begin)} args_{number} {end}\n"
    if f"bare_{number}" in used:
        rest = writer.literal(begin.removeprefix(form.openings[0]))
        rules += f"bare_{number}: {rest} args_{number} {end}\n"
    return rules


def faulty_rule(grammar: Grammar, complaint: str) -> tuple[str, str] | None:
    """Of an engine's complaint the rule of the grammar that is meant, and the reason; None where it names none."""
    found = _COMPLAINT.fullmatch(complaint.partition(": ")[2])
    lines = grammar.source.splitlines()
    if found is None or int(found["line"]) > len(lines):
        return None
    return lines[int(found["line"]) - 1].partition(":")[0], found["reason"]


def _quoted(begin: str, name: str) -> str:
    return json.dumps(name) if '"name"' in begin else name


def reasoned(grammar: Grammar, thinking: Thinking, vocabulary: Vocabulary) -> Grammar | None:
    """The same for the answer behind the reasoning of a thinking model; None where this kind cannot be led up to."""
    try:
        body = _body(grammar)
    except (ValueError, RecursionError):
        return grammar  # the engine says what is wrong with it
    if body is None:
        return None if thinking.is_begun else grammar
    writer = _Writer(vocabulary)
    return Grammar(kind="lark", source=f"start: {writer.thinking(thinking)} body\n{body}{writer.rules}{_TEXT}")


def _body(grammar: Grammar) -> str | None:
    match grammar.kind:
        case "json_schema":
            schema = json.loads(grammar.source)
            if isinstance(schema, dict):
                own = schema.get("x-guidance")
                schema = {**schema, "x-guidance": {**(own if isinstance(own, dict) else {}), **_GUIDANCE}}
            return f"body: %json {json.dumps(schema, ensure_ascii=False)}\n"
        case "regex":
            return "body: /" + re.sub(r"(\\.)|/", lambda match: match[1] or r"\/", grammar.source) + "/\n"
        case "choice":
            choices = json.loads(grammar.source)
            if not choices or not all(choices):
                raise ValueError("there must be choices, and none that is empty")
            return f"body: {' | '.join(json.dumps(one, ensure_ascii=False) for one in choices)}\n"
        case _:
            return None


class _Writer:
    """Writes literals: what is a token by itself is told as that token, for its text would not be it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.rules = ""

    def literal(self, text: str) -> str:
        parts = [part for part in _MARKER.split(text) if part]
        return " ".join(self._token(part) or json.dumps(part, ensure_ascii=False) for part in parts)

    def trigger(self, name: str, marker: str) -> str:
        """A rule for any text up to and with the marker, as a token or spelt."""
        spelt = f"{name}_spelt[lazy]: TEXT {json.dumps(marker, ensure_ascii=False)}\n"
        token = self._token(marker)
        return f"{name}: {name}_spelt" + (f" | TEXT {token}" if token else "") + f"\n{spelt}"

    def thinking(self, thinking: Thinking | None) -> str:
        """What stands for the reasoning in the first rule."""
        if thinking is None:
            return ""
        self.rules += self.trigger("thought", thinking.tags.end)
        begin = f"({self.literal(thinking.tags.begin)} thought SPACE)?"
        return "thought SPACE" if thinking.is_begun else begin

    def _token(self, marker: str) -> str | None:
        """None for what is no single token."""
        if _MARKER.fullmatch(marker) is None:
            return None
        found = self._vocabulary.encode(marker, add_special_tokens=False)
        return f"<[{found[0]}]>" if len(found) == 1 else None
