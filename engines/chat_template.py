"""A checkpoint's chat template: a conversation and its tools -> the text the model was trained to continue.

Templates come with checkpoints and are run in jinja's sandbox, in the environment that transformers renders them in,
so that they mean the same here. A client never brings one: a sandbox bounds no time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from jinja2 import Template, TemplateError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from loraplex.engines.errors import InvalidRequest
from loraplex.engines.tokenizer_protocol import ChatMessage

# What a template raises over a conversation it was not written for, besides its own errors.
_COMPLAINTS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
# What every template is given, beside the special tokens; `tools` is one as well, but not every template reads it.
_OURS = frozenset({"messages", "add_generation_prompt", "documents"})
# Stands behind the text to be continued while the template runs, which may strip it.
_CONTINUE_HERE = "LORAPLEX_CONTINUES_HERE "


class ChatTemplate:
    """One template, or one for conversations with tools beside the default.

    `variables` are the names that it reads beside the conversation: `tools`, `enable_thinking` and the like.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, object]) -> None:
        """`sources` by their names; "default" must be there, "tool_use" is taken where there are tools."""
        self.source = sources["default"]
        self._special_tokens = dict(special_tokens)
        environment = _environment()
        self._default = environment.from_string(self.source)
        self._for_tools = environment.from_string(sources.get("tool_use", self.source))
        trees = [environment.parse(source) for name, source in sources.items() if name in ("default", "tool_use")]
        read = set().union(*(meta.find_undeclared_variables(tree) for tree in trees))
        self.variables = frozenset(read - {*_OURS, *environment.globals, *special_tokens})

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text. Raises InvalidRequest where the template refuses it."""
        template = self._for_tools if tools else self._default
        if continue_final_message:
            return self._continued(template, messages, tools, variables or {})
        return self._render(template, messages, tools, add_generation_prompt, variables or {})

    def _render(
        self,
        template: Template,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        try:
            return template.render(
                **{
                    **variables,
                    **self._special_tokens,
                    "messages": [_as_dict(message) for message in messages],
                    "tools": list(tools) or None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except _COMPLAINTS as error:
            raise InvalidRequest(f"the model's chat template refuses this conversation: {error}", "messages") from error

    def _continued(
        self,
        template: Template,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
    ) -> str:
        """Up to the end of the last message's text, which is left open."""
        text = messages[-1].content if messages else None
        if not text:
            raise InvalidRequest("the last message has no text to continue", "continue_final_message")
        marked = msgspec.structs.replace(messages[-1], content=text + _CONTINUE_HERE)
        rendered = self._render(template, [*messages[:-1], marked], tools, False, variables)
        place = rendered.rfind(_CONTINUE_HERE.strip())
        if place < 0:
            raise InvalidRequest("the model's chat template leaves the last message out", "continue_final_message")
        keeps_spaces = rendered[place:].startswith(_CONTINUE_HERE)
        return rendered[:place] if keeps_spaces else rendered[:place].rstrip()


def read_chat_template(directory: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """The template of a checkpoint's directory, whose `tokenizer_config.json` holds `config`."""
    sources = template_sources(directory, config)
    return ChatTemplate(sources, special_tokens(config)) if "default" in sources else None


def template_sources(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The templates' texts by their names; a file goes before what `tokenizer_config.json` says."""
    said = config.get("chat_template")
    named: list[dict[str, Any]] = said if isinstance(said, list) else [{"name": "default", "template": said}]
    sources = {str(entry["name"]): entry["template"] for entry in named if isinstance(entry.get("template"), str)}
    files = {"default": directory / "chat_template.jinja"}
    files |= {path.stem: path for path in (directory / "additional_chat_templates").glob("*.jinja")}
    return sources | {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}


def special_tokens(config: Mapping[str, Any]) -> dict[str, object]:
    """The special tokens that templates may name, as texts; None for one that there is not."""
    return {name: _token_text(config.get(name)) for name in _SPECIAL_TOKENS}


_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _as_dict(message: ChatMessage) -> dict[str, Any]:
    """A message as templates expect it, without the fields it lacks: many ask whether a field is there."""
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        said["name"] = message.name
    if message.tool_call_id is not None:
        said["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        said["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        said["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return said


def _arguments(text: str) -> object:
    """Templates print a call's arguments as JSON, from values rather than from text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _to_json(value: object, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _token_text(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token
