"""How families of models write tool calls: one entry a family, chosen by what their chat templates say.

An entry is data for the parser (`calls.py`) and for the grammars that hold a model to it (`call_grammars.py`).
"""

import secrets
import string
from typing import Literal

import regex
from msgspec import Struct
from msgspec.structs import replace

_NAME = r'"name"\s*:\s*"(?P<name>[^"\\]+)"'
# A call as an object whose arguments come last and are an object: they can be told while they are written.
_OBJECT = (
    rf'(?P<object>\{{)\s*(?:"type"\s*:\s*"function"\s*,\s*)?{_NAME}\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)'
)


class Script(Struct, frozen=True, kw_only=True):
    """How calls are written when a grammar writes them. `%s` stands for the tool's name."""

    first: str  # what the first call begins behind
    begin: str
    end: str
    joint: str  # between calls
    last: str = ""


class CallFormat(Struct, frozen=True, kw_only=True):
    """One family's way to call.

    `openings` begin a call wherever they stand, `opens_answer` at an answer's beginning alone, `opens_next` right
    behind another call. `head` matches from there to the arguments, and `object` in it says that a brace closes the
    call; `lead` matches what stands before a call that is JSON in any order, None where there is no such form.
    `closings` may follow a call, in this order.
    """

    name: str
    openings: tuple[str, ...]
    head: regex.Pattern[str]
    closings: tuple[str, ...]
    script: Script
    lead: regex.Pattern[str] | None = None
    opens_answer: tuple[str, ...] = ()
    opens_next: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()  # all of them in a chat template betray the family
    id_kind: Literal["openai", "short"] = "openai"

    def new_id(self) -> str:
        """An id for a call, of a form that the family's template accepts."""
        if self.id_kind == "openai":
            return f"call_{secrets.token_hex(12)}"
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


HERMES = CallFormat(
    name="hermes",
    openings=("<tool_call>",),
    head=regex.compile(rf"<tool_call>\s*{_OBJECT}"),
    lead=regex.compile(r"<tool_call>\s*(?=[\[{])"),
    closings=("</tool_call>",),
    script=Script(first="", begin='<tool_call>\n{"name": %s, "arguments": ', end="}\n</tool_call>", joint="\n"),
    markers=("<tool_call>",),
)
LLAMA3 = CallFormat(
    name="llama3",
    openings=("<|python_tag|>",),
    opens_answer=("{",),
    opens_next=("{",),
    head=regex.compile(rf"(?:<\|python_tag\|>)?\s*{_OBJECT}"),
    lead=regex.compile(r"(?:<\|python_tag\|>)?\s*(?=\{)"),
    closings=(";", "<|eom_id|>"),
    script=Script(first="", begin='{"name": %s, "parameters": ', end="}", joint="; "),
    markers=("<|python_tag|>",),
)
MISTRAL = CallFormat(
    name="mistral",
    openings=("[TOOL_CALLS]",),
    opens_next=("{",),
    head=regex.compile(
        rf"(?:\[TOOL_CALLS\]\s*)?(?:\[\s*)?{_OBJECT}"
        r"|\[TOOL_CALLS\]\s*(?P<name>[\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?\[ARGS\]\s*(?=\{)"
    ),
    lead=regex.compile(r"(?:\[TOOL_CALLS\]\s*)?(?=[\[{])"),
    closings=(",", "]"),
    script=Script(first="[TOOL_CALLS][", begin='{"name": %s, "arguments": ', end="}", joint=", ", last="]"),
    markers=("[TOOL_CALLS]",),
    id_kind="short",
)
MISTRAL_ARGS = replace(  # what it wrote later
    MISTRAL,
    name="mistral_args",
    script=Script(first="", begin="[TOOL_CALLS]%s[ARGS]", end="", joint=""),
    markers=("[TOOL_CALLS]", "[ARGS]"),
)
_BEGIN, _END, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
DEEPSEEK = CallFormat(
    name="deepseek",
    openings=("<｜tool▁calls▁begin｜>", _BEGIN),
    head=regex.compile(
        rf"(?:<｜tool▁calls▁begin｜>\s*)?{_BEGIN}"
        rf"(?:function{_SEPARATOR}(?P<name>[^\s<{{]+)\n```json\n\s*|(?P<name>[^\s<{{]+){_SEPARATOR}\s*)(?=\{{)"
    ),
    closings=("```", _END, "<｜tool▁calls▁end｜>"),
    script=Script(
        first="<｜tool▁calls▁begin｜>", begin=f"{_BEGIN}%s{_SEPARATOR}", end=_END, joint="", last="<｜tool▁calls▁end｜>"
    ),
    markers=("<｜tool▁calls▁begin｜>",),
)
DEEPSEEK_FENCED = replace(  # what it wrote before
    DEEPSEEK,
    name="deepseek_fenced",
    script=Script(
        first="<｜tool▁calls▁begin｜>",
        begin=f"{_BEGIN}function{_SEPARATOR}%s\n```json\n",
        end=f"\n```{_END}",
        joint="\n",
        last="<｜tool▁calls▁end｜>",
    ),
    markers=("<｜tool▁calls▁begin｜>", "```json"),
)

_BY_MARKERS = (MISTRAL_ARGS, MISTRAL, DEEPSEEK_FENCED, DEEPSEEK, HERMES, LLAMA3)  # the first whose marker is there
CALL_FORMATS = {form.name: form for form in _BY_MARKERS}


def call_format(setting: str, chat_template: str | None) -> CallFormat:
    """The family that the setting names; `auto` goes by the template, and takes Hermes' where it does not say."""
    if setting != "auto":
        return CALL_FORMATS[setting]
    template = chat_template or ""
    return next((form for form in _BY_MARKERS if all(marker in template for marker in form.markers)), HERMES)
