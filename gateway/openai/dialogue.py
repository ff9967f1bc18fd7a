"""One chat request, read: what the model is told, what it may say, and how its answer is taken apart."""

from typing import Any

from msgspec.structs import replace

from loraplex.config.settings import Model
from loraplex.engines.protocol import GenerateRequest, Grammar
from loraplex.engines.stop_strings import StopStrings
from loraplex.engines.tokenizer_protocol import Room, Tokenizer
from loraplex.gateway.errors import MalformedRequest, UnsupportedParameter
from loraplex.gateway.openai.chat_wire import ChatRequest
from loraplex.gateway.openai.tool_wire import NamedTool
from loraplex.gateway.openai.toolless import without_tools
from loraplex.gateway.speech.call_grammars import CallableTool, Thinking, call_grammar, faulty_rule, reasoned
from loraplex.gateway.speech.calls import CallParser
from loraplex.gateway.speech.formats import HERMES, call_format
from loraplex.gateway.speech.reasoning import ReasoningParser, reasoning_tags
from loraplex.gateway.speech.speech import Speech

LARGE_BODY = 65_536  # bytes; where a smaller one is read and checked in a few milliseconds, a larger one is in a thread
LONG_TEXT = 16_384  # characters; a shorter text is tokens in a few milliseconds, a longer one is made so in a thread
MANY_MESSAGES = 256  # take as long however short they are
_TAIL = 16  # tokens; the end of a prompt that may hold the tag that begins the reasoning
_SWITCHES = ("enable_thinking", "thinking")  # what templates call the variable that turns reasoning on


class Dialogue:
    """Made for one request, and what `Answers` is asked with.

    Raises MalformedRequest or UnsupportedParameter naming the field.
    """

    def __init__(self, body: ChatRequest, tokenizer: Tokenizer, model: Model, *, is_large: bool = False) -> None:
        """`tokenizer` is that of the request's adapter; `is_large` says that the body was."""
        self.body = body
        self._is_large = is_large
        self.tokenizer = tokenizer
        self._names = body.callable_names()
        tools = [tool.for_template() for tool in body.tools or []] if self._names else []
        self._messages = [message.for_template() for message in body.messages]
        knows_tools = "tools" in self.tokenizer.template_variables
        is_about_tools = bool(tools) or any(message.role == "tool" for message in self._messages)
        if is_about_tools and not knows_tools:
            self._messages, self._tools = without_tools(self._messages, tools), []
        else:
            self._tools = tools
        template = self.tokenizer.chat_template
        self._tags = reasoning_tags(model.reasoning_parser, template)
        self._form = call_format(model.tool_parser, template) if self._names and knows_tools else HERMES
        self._stops = () if self.is_plain else _stops(body)
        self._variables = _variables(body, self.tokenizer, may_reason=self._tags is not None)
        self._is_begun = False
        self._held: Grammar | None = None

    @property
    def model(self) -> str:
        return self.body.model

    @property
    def stream(self) -> bool | None:
        return self.body.stream

    @property
    def max_tokens(self) -> int | None:
        return self.body.max_tokens if self.body.max_completion_tokens is None else self.body.max_completion_tokens

    @property
    def num_choices(self) -> int:
        return self.body.num_choices

    @property
    def includes_usage(self) -> bool:
        return self.body.includes_usage

    @property
    def is_plain(self) -> bool:
        """Whether all of the answer is text."""
        return not self._names and self._tags is None

    @property
    def num_characters(self) -> int:
        return sum(len(message.content or "") for message in self._messages)

    @property
    def is_long(self) -> bool:
        """Whether the prompt is to be encoded in a thread."""
        is_long = self._is_large or len(self._messages) > MANY_MESSAGES or self.num_characters > LONG_TEXT
        return is_long or self.tokenizer.renders_apart

    def encode(self, room: Room) -> list[int]:
        """The prompt's tokens. Raises InvalidRequest where the template refuses, or PromptTooLong."""
        continues = bool(self.body.continue_final_message)
        prompt = self.tokenizer.encode_chat(
            self._messages,
            add_generation_prompt=not continues and self.body.add_generation_prompt is not False,
            continue_final_message=continues,
            tools=self._tools,
            variables=self._variables,
            room=room,
        )
        if self._tags is not None:
            end = b"".join(self.tokenizer.token_bytes(token) for token in prompt[-_TAIL:])
            self._is_begun = end.rstrip().endswith(self._tags.begin.encode())
        return prompt

    def speech(self) -> Speech:
        """For one of the answers."""
        body = self.body
        reasoning = None if self._tags is None else ReasoningParser(self._tags, is_begun=self._is_begun)
        calls = CallParser(self._form, self._names, is_forced=body.forces_call) if self._names else None
        if not self._stops:
            return Speech(reasoning, calls)
        stops = StopStrings(self._stops, includes_stop=bool(body.include_stop_str_in_output))
        return Speech(reasoning, calls, stops, body.min_tokens or 0)

    def stopping(self) -> Speech | None:
        """What hears one of the answers and tells where a stop string ends it; None where the engine does.

        An engine knows no reasoning and no calls, which hold stop strings as they are.
        """
        return self.speech() if self._stops else None

    def hold(self, choices: list[GenerateRequest]) -> list[GenerateRequest]:
        """The same requests, held to what the answer may say. The prompt must have been encoded.

        Where to stop in it is not the engine's to find.
        """
        if self.is_plain:
            return choices
        grammar = self._held = self._grammar()
        tags = [] if self._tags is None else [self._tags.begin, self._tags.end]
        skips = all(self._leaves_text(marker) for marker in (*tags, *(self._form.openings if self._names else ())))
        held = []
        for choice in choices:
            said = choice.sampling
            shows = said.skip_special_tokens and not skips  # nobody asked for the end's name
            sampling = replace(
                said,
                grammar=grammar,
                stop=(),
                includes_stop=said.includes_stop and not shows,
                skip_special_tokens=said.skip_special_tokens and skips,
            )
            held.append(replace(choice, sampling=sampling))
        return held

    def _leaves_text(self, marker: str) -> bool:
        """Not where it is a special token, which is left out of texts unless asked for."""
        return bool(self.tokenizer.decode(self.tokenizer.encode(marker, add_special_tokens=False)))

    def complaint(self, reason: str) -> tuple[str, str] | None:
        """The field that said the grammar which an engine complains of, and the reason in that field's words."""
        body = self.body
        rule, fault = (self._held and faulty_rule(self._held, reason)) or ("", reason)
        if rule == "body":
            return body.complaint(f"the form cannot be used: {fault}")
        if not self._holds_calls or (self._held and self._held.kind != "lark"):
            return body.complaint(reason)
        if rule.startswith("args_"):
            name = self._callable()[int(rule.removeprefix("args_"))].name
            place = next(place for place, tool in enumerate(body.tools or []) if tool.function.name == name)
            return f"tools[{place}].function.parameters", f"calls of {name!r} cannot be held to its schema: {fault}"
        told = fault.replace("the lark cannot be used", "calls of these tools cannot be held to their schemas")
        return ("tool_choice" if body.forces_call else "tools"), told

    @property
    def _holds_calls(self) -> bool:
        body, tools = self.body, self.body.tools or []
        return bool(self._names) and (
            body.forces_call
            or body.parallel_tool_calls is False
            or len(self._names) < len(tools)
            or any(tool.function.strict for tool in tools)
            or body.form() is not None
        )

    def _grammar(self) -> Grammar | None:
        thinking = None if self._tags is None else Thinking(self._tags, self._is_begun)
        form = self.body.form()
        if not self._holds_calls:
            if form is None or thinking is None:
                return form[1] if form else None
            wrapped = reasoned(form[1], thinking, self.tokenizer)
            if wrapped is None:
                raise MalformedRequest("A grammar cannot hold this model's answer: it reasons first.", form[0])
            return wrapped
        is_forced = self.body.forces_call
        grammar = call_grammar(
            self._form,
            self._callable(),
            self.tokenizer,
            thinking,
            is_forced=is_forced,
            is_parallel=self.body.parallel_tool_calls is not False and not isinstance(self.body.tool_choice, NamedTool),
            otherwise=form[1] if form and not is_forced else None,
        )
        if grammar is None and form is not None:
            raise MalformedRequest("This form is not possible together with tools that this model may call.", form[0])
        return grammar

    def _callable(self) -> list[CallableTool]:
        """A forced call keeps to the schema always, as far as that can be where the tool is not `strict`; a free one
        where it is.
        """
        found = []
        for tool in self.body.tools or []:
            spec = tool.function
            if spec.name in self._names:
                schema = spec.parameters if spec.parameters is not None else {"additionalProperties": False}
                is_strict = bool(spec.strict) or spec.parameters is None
                kept = schema if self.body.forces_call or spec.strict else None
                found.append(CallableTool(spec.name, kept, is_strict))
        return found


def _stops(body: ChatRequest) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _variables(body: ChatRequest, tokenizer: Tokenizer, *, may_reason: bool) -> dict[str, Any] | None:
    """What the chat template is told beside the conversation; None where nothing is."""
    known = tokenizer.template_variables - {"tools"}
    variables: dict[str, Any] = {}
    if body.reasoning_effort is not None:
        variables |= _effort(body.reasoning_effort, known, may_reason=may_reason)
    for name, value in (body.chat_template_kwargs or {}).items():
        if name not in known:
            if name in _SWITCHES and value is False and not may_reason:
                continue  # it does not reason
            raise UnsupportedParameter(
                f"This model's chat template reads no {name!r}, but {', '.join(sorted(known)) or 'nothing'}.",
                f"chat_template_kwargs.{name}",
            )
        variables[name] = value
    return variables or None


def _effort(effort: str, known: frozenset[str], *, may_reason: bool) -> dict[str, Any]:
    found: dict[str, Any] = {name: effort != "none" for name in _SWITCHES if name in known}
    if "reasoning_effort" in known:
        found["reasoning_effort"] = effort
    if not found and (effort != "none" or may_reason):
        raise UnsupportedParameter("This model cannot be told how much to reason.", "reasoning_effort")
    return found
