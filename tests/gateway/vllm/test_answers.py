"""What vLLM's answers tell beyond OpenAI's, where a request asks: what ended them, token ids, the prompt's chances."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from support.gateway import BASE, Gateway
from support.problems import assert_problem

EOS = 256
SAID = "hé END. Then!"
ENDS: dict[str, tuple[dict[str, Any], str, Any]] = {
    "string": ({"stop": "END"}, "stop", "END"),
    "first of several": ({"stop": ["Then", ".", "END"]}, "stop", "END"),
    "included": ({"stop": ["END"], "include_stop_str_in_output": True}, "stop", "END"),
    "end of sequence": ({"stop": ["never"]}, "stop", None),
    "length": ({"stop": ["END"], "max_tokens": 2}, "length", None),
    "stop token that does not come": ({"stop_token_ids": [1]}, "stop", None),
}
TOOLS = [{"type": "function", "function": {"name": "look"}}]  # for these an answer is taken apart


@pytest.fixture(scope="module")
def openai(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0) as client:
        yield client


def ask(openai: OpenAI, kind: str, *, stream: bool, **fields: Any) -> list[Any]:
    """The answer, or the chunks of one, from the route that `kind` names; all that OpenAI has not is sent beside."""
    fields = {name: value for name, value in fields.items() if value is not None}
    extra: dict[str, Any] = {"extra_body": fields, "stream": stream, "model": BASE}
    if kind == "completion":
        answer: Any = openai.completions.create(prompt=SAID, max_tokens=fields.pop("max_tokens", 100), **extra)
    else:
        tools: Any = {"tools": TOOLS} if kind == "spoken" else {}
        answer = openai.chat.completions.create(messages=[{"role": "user", "content": SAID}], **tools, **extra)
    return list(answer) if stream else [answer]


KINDS = pytest.mark.parametrize("kind", ["chat", "spoken", "completion"])
STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@STREAMS
@KINDS
@pytest.mark.parametrize("name", ENDS)
def test_answer_tells_what_ended_it(openai: OpenAI, kind: str, name: str, stream: bool) -> None:
    fields, finish_reason, stop_reason = ENDS[name]
    choice = ask(openai, kind, stream=stream, **fields)[-1].choices[0]
    assert (choice.finish_reason, choice.stop_reason) == (finish_reason, stop_reason)


@STREAMS
@KINDS
def test_answer_that_names_no_end_is_openais(openai: OpenAI, kind: str, stream: bool) -> None:
    for chunk in ask(openai, kind, stream=stream):
        assert not chunk.model_extra
        assert not chunk.choices[0].model_extra


@STREAMS
@KINDS
def test_token_ids_are_all_that_was_read_and_made(openai: OpenAI, kind: str, stream: bool) -> None:
    """Of the echo engine they are the bytes; the end of sequence is one, though it is no text."""
    chunks = ask(openai, kind, stream=stream, return_token_ids=True)
    made = [token for chunk in chunks for token in getattr(chunk.choices[0], "token_ids", None) or []]
    places = [chunk.choices[0] if kind == "completion" else chunk for chunk in chunks]
    prompts = [place.prompt_token_ids for place in places if getattr(place, "prompt_token_ids", None) is not None]
    assert bytes(made[:-1]).decode() == SAID
    assert made[-1] == EOS
    assert [bytes(prompt).decode() for prompt in prompts] == [SAID]


@STREAMS
def test_token_ids_of_several_prompts_are_told_apart(openai: OpenAI, stream: bool) -> None:
    answer: Any = openai.completions.create(
        model=BASE, prompt=["ab", "c"], n=2, stream=stream, extra_body={"return_token_ids": True}
    )
    made: dict[int, list[int]] = {}
    prompts: dict[int, str] = {}
    for choice in [choice for chunk in (answer if stream else [answer]) for choice in chunk.choices]:
        made.setdefault(choice.index, []).extend(getattr(choice, "token_ids", None) or [])
        if (prompt := getattr(choice, "prompt_token_ids", None)) is not None:
            assert choice.index not in prompts
            prompts[choice.index] = bytes(prompt).decode()
    assert prompts == {0: "ab", 1: "ab", 2: "c", 3: "c"}
    assert {index: bytes(ids[:-1]).decode() for index, ids in made.items()} == prompts


@KINDS
@pytest.mark.parametrize("most", [0, 2])
def test_prompt_is_told_with_its_chances(openai: OpenAI, kind: str, most: int) -> None:
    """The echo engine is certain of each token."""
    answer = ask(openai, kind, stream=False, prompt_logprobs=most)[0]
    told = (answer.choices[0] if kind == "completion" else answer).prompt_logprobs
    prompt = SAID.encode()
    assert told[0] is None
    assert [list(place) for place in told[1:]] == [[str(token)] for token in prompt[1:]]
    assert [place[str(token)]["logprob"] for place, token in zip(told[1:], prompt[1:], strict=True)] == [0.0] * (
        len(prompt) - 1
    )
    assert {place[str(token)]["rank"] for place, token in zip(told[1:], prompt[1:], strict=True)} == {
        1 if most else None
    }
    assert "".join(one["decoded_token"] for place in told[4:] for one in place.values()) == SAID[3:]


def test_prompt_of_one_token_has_nothing_before_it(openai: OpenAI) -> None:
    answer: Any = openai.completions.create(model=BASE, prompt="x", extra_body={"prompt_logprobs": 1})
    assert answer.choices[0].prompt_logprobs == [None]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "echo": True, "logprobs": 2}, "prompt_logprobs"),
        ({"return_token_ids": 1}, "return_token_ids"),
    ],
    ids=json.dumps,
)
def test_what_cannot_be_told_is_refused_by_name(gateway: Gateway, fields: dict[str, Any], param: str) -> None:
    with gateway.client() as client:
        answer = client.post("/v1/completions", json={"model": BASE, "prompt": "x", **fields})
    assert_problem(answer, 400, "invalid_request", param)


def test_echo_is_of_the_prompt_that_was_read(openai: OpenAI) -> None:
    answer: Any = openai.completions.create(
        model=BASE, prompt="0123456789", echo=True, logprobs=0, extra_body={"truncate_prompt_tokens": 3}
    )
    choice = answer.choices[0]
    assert choice.text == "789789"
    assert choice.logprobs.tokens[:3] == ["7", "8", "9"]
    assert choice.logprobs.text_offset[:6] == list(range(6))


@KINDS
def test_every_chunk_tells_its_usage_so_far(openai: OpenAI, kind: str) -> None:
    told = {"include_usage": True, "continuous_usage_stats": True}
    chunks = ask(openai, kind, stream=True, stream_options=told)
    *before, last = chunks
    numbers = [chunk.usage.completion_tokens for chunk in before]
    assert numbers == sorted(numbers)
    assert numbers[-1] == last.usage.completion_tokens == len(SAID.encode()) + 1
    assert len(set(numbers)) > len(SAID) // 2
    for chunk in chunks:
        usage = chunk.usage
        assert usage.prompt_tokens == len(SAID.encode())
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@KINDS
def test_usage_of_chunks_is_told_with_that_of_the_whole_alone(openai: OpenAI, kind: str) -> None:
    for chunk in ask(openai, kind, stream=True, stream_options={"continuous_usage_stats": True}):
        assert chunk.usage is None


@STREAMS
@KINDS
def test_request_is_called_what_its_client_calls_it(gateway: Gateway, openai: OpenAI, kind: str, stream: bool) -> None:
    """Two of one name are two requests all the same."""
    name = f"mine-{kind}.{stream}"
    for _ in range(2):
        chunks = ask(openai, kind, stream=stream, request_id=name)
        assert {chunk.id for chunk in chunks} == {f"{'cmpl' if kind == 'completion' else 'chatcmpl'}-{name}"}
    with gateway.admin() as admin:
        found = admin.get("/admin/v1/usage/requests", params={"tenant_id": gateway.tenant_id}).json()["data"]
    assert [name in json.dumps(row) for row in found].count(True) == 2


def test_name_of_a_request_stands_in_its_header(gateway: Gateway) -> None:
    with gateway.client() as client:
        body = {"model": BASE, "prompt": "x", "request_id": "mine"}
        assert client.post("/v1/completions", json=body).headers["x-request-id"] == "mine"
        for bad in ("", "a b", "a\nb", "a\n", "x" * 129, "é"):
            refused = client.post("/v1/completions", json={**body, "request_id": bad})
            assert_problem(refused, 400, "invalid_request", "request_id")
