"""Tools, tool history, variables and continued messages: the same text as transformers gives, on the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.models import make_tokenizer
from transformers import AutoTokenizer

from loraplex.engines.errors import InvalidRequest
from loraplex.engines.tokenizer import HubTokenizer
from loraplex.engines.tokenizer_protocol import ChatMessage, ToolCall

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place, e.g. of Łódź.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
CALL = ToolCall(id="call_1", name="weather", arguments='{"place": "Łódź", "days": [1, 2]}')
HISTORY = [
    ChatMessage(role="user", content="Is it warm?"),
    ChatMessage(role="assistant", content=None, tool_calls=(CALL,), reasoning_content="I must look."),
    ChatMessage(role="tool", content="21 degrees", tool_call_id="call_1", name="weather"),
]
THEIRS: list[dict[str, Any]] = [
    {"role": "user", "content": "Is it warm?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "I must look.",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": {"place": "Łódź", "days": [1, 2]}},
            }
        ],
    },
    {"role": "tool", "content": "21 degrees", "tool_call_id": "call_1", "name": "weather"},
]
TEMPLATE = (
    "{% if tools %}Tools: {% for tool in tools %}{{ tool | tojson(indent=2) }}{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content is defined %}({{ m.reasoning_content }}){% endif %}"
    "{% if m.content is not none %}{{ m.content }}{% endif %}"
    "{% if m.tool_call_id is defined %}<{{ m.tool_call_id }} {{ m.name }}>{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.id }}:{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{% for key, value in call.function.arguments | items %}{{ key }}={{ value }};{% endfor %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)


def saved(directory: Path, template: Any) -> tuple[HubTokenizer, Any]:
    """(ours, theirs) of the same files."""
    theirs = make_tokenizer()
    theirs.chat_template = template
    theirs.save_pretrained(directory)
    return HubTokenizer(directory), AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("tools", [[], TOOLS])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_tools_and_their_history_equal_transformers(
    tmp_path: Path, tools: list[dict[str, Any]], variables: dict[str, Any]
) -> None:
    ours, theirs = saved(tmp_path, TEMPLATE)
    expected = theirs.apply_chat_template(
        THEIRS, tools=tools or None, add_generation_prompt=True, return_dict=False, **variables
    )
    assert ours.encode_chat(HISTORY, tools=tools, variables=variables) == expected


@pytest.mark.parametrize("is_in_config", [False, True])
def test_template_for_tools_is_taken_where_there_are_tools(tmp_path: Path, is_in_config: bool) -> None:
    templates = {"default": "plain", "tool_use": "{{ tools[0].function.name }}"}
    ours, theirs = saved(tmp_path, templates)
    if is_in_config:
        (tmp_path / "chat_template.jinja").unlink()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").unlink()
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        ours = HubTokenizer(tmp_path)
    for tools in ([], TOOLS):
        expected = theirs.apply_chat_template(THEIRS[:1], tools=tools or None, return_dict=False)
        assert ours.encode_chat(HISTORY[:1], tools=tools) == expected
    assert ours.template_variables == {"tools"}


@pytest.mark.parametrize("text", ["Once upon", "Once upon ", "  a\n"])
@pytest.mark.parametrize("content", ["m.content", "m.content | trim"])
def test_continued_message_equals_transformers(tmp_path: Path, text: str, content: str) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ " + content + " }}[end]\n{% endfor %}"
    ours, theirs = saved(tmp_path, template)
    said = [{"role": "user", "content": "Tell."}, {"role": "assistant", "content": text}]
    expected = theirs.apply_chat_template(said, continue_final_message=True, return_dict=False)
    messages = [ChatMessage(role=message["role"], content=message["content"]) for message in said]
    assert ours.encode_chat(messages, continue_final_message=True) == expected


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", TEMPLATE])
def test_continuing_what_is_not_there_is_refused(tmp_path: Path, template: str) -> None:
    ours, _ = saved(tmp_path, template)
    said = [
        ChatMessage(role="user", content="x"),
        ChatMessage(role="assistant", content=None if "m." in template else "y"),
    ]
    with pytest.raises(InvalidRequest, match="last message") as caught:
        ours.encode_chat(said, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_variables_are_those_the_template_reads(tmp_path: Path) -> None:
    ours, _ = saved(
        tmp_path, TEMPLATE + "{{ strftime_now('') }}{{ bos_token }}{{ reasoning_effort }}{% set own = 1 %}{{ own }}"
    )
    assert ours.template_variables == {"tools", "enable_thinking", "reasoning_effort"}
    assert ours.chat_template is not None
    assert ours.chat_template.startswith("{% if tools %}")


@pytest.mark.parametrize(
    "template",
    ["{{ 'a' + messages[1].content }}", "{{ enable_thinking.x.y }}", "{{ messages[9].role.x }}", "{{ 1 / 0 }}"],
)
def test_template_that_stumbles_is_the_requests_error(tmp_path: Path, template: str) -> None:
    ours, _ = saved(tmp_path, template)
    with pytest.raises(InvalidRequest, match="chat template refuses"):
        ours.encode_chat(HISTORY)


@pytest.mark.parametrize("arguments", ["[1]", "no JSON", '{"a":' * 50_000, "[" * 50_000 + "]" * 50_000])
def test_arguments_that_are_no_object_are_shown_as_they_are(tmp_path: Path, arguments: str) -> None:
    ours, _ = saved(tmp_path, "{{ messages[0].tool_calls[0].function.arguments }}")
    call = ToolCall(id="c", name="f", arguments=arguments)
    message = ChatMessage(role="assistant", content=None, tool_calls=(call,))
    assert ours.decode(ours.encode_chat([message])) == arguments


def test_special_tokens_leave_text_where_asked(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = HubTokenizer(tmp_path)
    for skips, expected in ((True, "hi"), (False, "h<|end|>i")):
        stream = tokenizer.stream(skip_special_tokens=skips)
        ids = [*tokenizer.encode("h"), 257, *tokenizer.encode("i")]
        assert "".join([*(stream.feed(token) for token in ids), stream.flush()]) == expected
