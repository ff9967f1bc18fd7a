"""Tools for models whose chat template knows none: told in a system message, called and answered in Hermes' form."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from loraplex.engines.tokenizer_protocol import ChatMessage

_INSTRUCTIONS = """You may call functions. They are, each as a JSON object:
%s
To call one, write nothing but this, once for every call:
<tool_call>
{"name": "NAME", "arguments": {ARGUMENTS}}
</tool_call>"""


def without_tools(messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]]) -> list[ChatMessage]:
    """The same conversation in roles and contents alone."""
    told = [_plain(message) for message in messages]
    if not tools:
        return told
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    instructions = _INSTRUCTIONS.replace("%s", listed)
    if told and told[0].role == "system":
        return [msgspec.structs.replace(told[0], content=f"{told[0].content}\n\n{instructions}"), *told[1:]]
    return [ChatMessage(role="system", content=instructions), *told]


def _plain(message: ChatMessage) -> ChatMessage:
    if message.role == "tool":
        return ChatMessage(role="user", content=f"<tool_response>\n{message.content}\n</tool_response>")
    calls = [f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}\n</tool_call>'
             for call in message.tool_calls]  # fmt: skip
    content = "\n".join([*([message.content] if message.content else []), *calls])
    return msgspec.structs.replace(message, content=content, tool_calls=())
