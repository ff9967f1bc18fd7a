"""The JSON of function tools, the choice among them, and calls; chat completions' way of writing them."""

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.openai.wire import GenerationFields

ToolName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}


class FunctionSpec(Struct, forbid_unknown_fields=True):
    """`parameters` is the JSON schema of the arguments, an object's; without it there are none."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Struct, forbid_unknown_fields=True, tag="function"):
    function: FunctionSpec

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        spec = self.function
        described = {} if spec.description is None else {"description": spec.description}
        parameters = _NO_ARGUMENTS if spec.parameters is None else spec.parameters
        return {"type": "function", "function": {"name": spec.name, **described, "parameters": parameters}}


class Named(Struct, forbid_unknown_fields=True):
    name: str


class NamedTool(Struct, forbid_unknown_fields=True, tag="function"):
    function: Named


class Allowed(Struct, forbid_unknown_fields=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], msgspec.Meta(min_length=1)]


class AllowedTools(Struct, forbid_unknown_fields=True, tag="allowed_tools"):
    allowed_tools: Allowed


ToolChoice: TypeAlias = Literal["none", "auto", "required"] | NamedTool | AllowedTools


class ToolFields(GenerationFields, forbid_unknown_fields=True, kw_only=True):
    """The fields of a request about tools, beside those of every generation."""

    tools: Annotated[list[FunctionTool], msgspec.Meta(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # vLLM's, known, not offered
    return_tokens_as_token_ids: Raw | UnsetType = UNSET

    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationFields.not_offered,
        "return_tokens_as_token_ids": (False,),
    }

    @property
    def forces_call(self) -> bool:
        """Whether the answer must be a call."""
        match self.tool_choice:
            case AllowedTools(allowed):
                return allowed.mode == "required"
            case NamedTool():
                return True
            case said:
                return said == "required"

    def callable_names(self) -> frozenset[str]:
        """The tools that the answer may call."""
        match self.tool_choice:
            case "none":
                return frozenset()
            case NamedTool(function):
                return frozenset({function.name})
            case AllowedTools(allowed):
                return frozenset(tool.function.name for tool in allowed.tools)
            case _:
                return frozenset(tool.function.name for tool in self.tools or [])

    def check_tools(self) -> None:
        """Raises MalformedRequest, naming the field."""
        names = [tool.function.name for tool in self.tools or []]
        for place, tool in enumerate(self.tools or []):
            if tool.function.name in names[:place]:
                raise MalformedRequest(
                    f"There are two tools named {tool.function.name!r}.", f"tools[{place}].function.name"
                )
            if (tool.function.parameters or _NO_ARGUMENTS).get("type", "object") != "object":
                raise MalformedRequest(
                    "A function's parameters are the schema of an object.", f"tools[{place}].function.parameters"
                )
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise MalformedRequest("tool_choice is only allowed when tools are given.", "tool_choice")
        for name in sorted(self.callable_names() - set(names)):
            raise MalformedRequest(f"tool_choice names {name!r}, which is not among the tools.", "tool_choice")


class CalledFunction(Struct, forbid_unknown_fields=True):
    """`arguments` is JSON text as the model wrote it."""

    name: str
    arguments: str
    parsed_arguments: Raw | UnsetType = UNSET  # the SDK's own reading of the arguments, without effect


class SaidCall(Struct, forbid_unknown_fields=True, tag="function"):
    """A call in the history. `index` is the place that a stream gave it, without effect."""

    id: str
    function: CalledFunction
    index: int | UnsetType | None = UNSET


class MadeFunction(Struct):
    name: str
    arguments: str


class MadeCall(Struct):
    """A call in an answer."""

    id: str
    function: MadeFunction
    type: Literal["function"] = "function"
