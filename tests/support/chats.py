"""What chats with tools say and are told, scripted for the echo engine."""

from __future__ import annotations

import json
from typing import Any

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
SAYS_WEATHER = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"place": "Łódź"}}\n</tool_call>'
SAYS_TWO = SAYS_WEATHER + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
THOUGHT = "<think>\nWarm?\n</think>\n\n"


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]
