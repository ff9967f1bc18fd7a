"""Stop strings in chats that call and reason: they end the text, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI
from support.chats import SAYS_TWO, SAYS_WEATHER, THOUGHT, TOOLS, calls_of, user
from support.gateway import BASE, Gateway

STOPPED = [
    ({"stop": "Warm"}, SAYS_WEATHER, "I look.", 1, "tool_calls"),
    ({"stop": "place"}, SAYS_WEATHER, "I look.", 1, "tool_calls"),
    ({"stop": ["}", "\n"]}, SAYS_TWO, "I look.", 2, "tool_calls"),
    ({"stop": "look"}, SAYS_WEATHER, "I ", 0, "stop"),
    ({"stop": "look", "include_stop_str_in_output": True}, SAYS_WEATHER, "I look", 0, "stop"),
    ({"stop": "I", "min_tokens": 1}, SAYS_WEATHER, "I look.", 1, "tool_calls"),
    ({"stop": "lock"}, "I loc" + SAYS_WEATHER[7:], "I loc", 1, "tool_calls"),
    ({"stop": "END"}, SAYS_WEATHER + "Then END. " + "x" * 200, "I look.Then ", 1, "tool_calls"),
    ({"stop": "x ", "max_tokens": 2}, "x y", "", 0, "stop"),
    ({"stop": "x "}, "x ", "", 0, "stop"),
    ({"stop": "zz"}, "az", "az", 0, "stop"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("thought", "model"), [("", "plain"), (THOUGHT, "thinking")], ids=["plain", "thinking"])
@pytest.mark.parametrize(
    ("options", "says", "content", "num_calls", "reason"), STOPPED, ids=[f"{case[0]}-{case[1][:5]}" for case in STOPPED]
)
def test_stop_ends_the_text_and_neither_calls_nor_reasoning(
    request: pytest.FixtureRequest,
    model: str,
    thought: str,
    options: dict[str, Any],
    says: str,
    content: str,
    num_calls: int,
    reason: str,
    stream: bool,
) -> None:
    gateway: Gateway = request.getfixturevalue("gateway" if model == "plain" else "thinking")
    options = {
        **options,
        **{name: options[name] + len(thought) for name in ("min_tokens", "max_tokens") if name in options},
    }
    body = {"model": BASE, "messages": user(thought + says), "tools": TOOLS, **options}
    before = gateway.stats().total_generated_tokens
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0) as client:
        extra = {name: body.pop(name) for name in ("include_stop_str_in_output", "min_tokens") if name in body}
        if stream:
            with client.chat.completions.stream(
                **body, extra_body=extra, stream_options={"include_usage": True}
            ) as events:
                answer: Any = events.get_final_completion()
        else:
            answer = client.chat.completions.create(**body, extra_body=extra)
    message = answer.choices[0].message
    assert (message.content or "", answer.choices[0].finish_reason) == (content, reason)
    assert getattr(message, "reasoning_content", "") == ("Warm?" if thought else "")
    assert len(calls_of(message)) == num_calls
    num_tokens = answer.usage.completion_tokens
    assert num_tokens <= len((thought + says).encode()) + 1
    assert gateway.stats().total_generated_tokens - before <= num_tokens + 2
