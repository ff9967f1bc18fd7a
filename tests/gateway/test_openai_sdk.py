"""The official SDK against the echo engine: what it reads can be computed by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from support.gateway import BASE, Gateway


@pytest.fixture
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0) as client:
        yield client


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def frames(gateway: Gateway, **body: Any) -> list[bytes]:
    """The raw frames of a stream, and the bytes are nothing but frames."""
    with gateway.client() as client:
        response = client.post("/v1/chat/completions", json={"model": BASE, "stream": True, **body})
    assert response.headers["content-type"].startswith("text/event-stream")
    raw = response.content
    assert b"\r" not in raw
    assert raw.endswith(b"\n\n")
    return raw.removesuffix(b"\n\n").split(b"\n\n")


def test_create_answers_with_text_usage_and_reason(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=BASE, messages=user("Grüße!"))
    assert answer.choices[0].message.content == "Grüße!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (8, 9, 17)


def test_create_adapter_answers_as_itself(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="team/echo-one", messages=user("hi"))
    assert answer.choices[0].message.content == "team/echo-one: hi"
    assert answer.model == "team/echo-one"


def test_create_max_tokens_ends_with_length(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=BASE, messages=user("abcdef"), max_completion_tokens=3)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("abc", "length")


def test_create_stop_string_cuts(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=BASE, messages=user("one two three"), stop=["three", " two"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("one", "stop")


def test_create_parts_and_developer_role_are_text(client: OpenAI) -> None:
    messages: Any = [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
    ]
    assert client.chat.completions.create(model=BASE, messages=messages).choices[0].message.content == "a\nbc"


def test_create_several_choices_and_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=BASE, messages=user("hé"), n=3, logprobs=True, top_logprobs=2)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(0, "hé"), (1, "hé"), (2, "hé")]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.bytes for token in logprobs.content] == [[104], [195], [169]]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 12)


def test_stream_chunks_share_id_and_order(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=BASE, messages=user("abc"), stream=True))
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "a", "b", "c", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 4 + ["stop"]


def test_stream_include_usage_comes_in_a_chunk_of_its_own(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=BASE, messages=user("abc"), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 7
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_frames_are_exact(gateway: Gateway) -> None:
    raw = frames(gateway, messages=user("ab"), stream_options={"include_usage": True})
    assert raw[-1] == b"data: [DONE]"
    chunks = [json.loads(frame.removeprefix(b"data: ")) for frame in raw[:-1]]
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert "usage" not in json.loads(frames(gateway, messages=user("ab"))[0].removeprefix(b"data: "))


def test_stream_silence_is_filled_with_comments(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.services.engine, "_step_seconds", 0.5)  # beside comments after 0.2
    with gateway.client() as client:
        body = {"model": BASE, "stream": True, "messages": user("xy")}
        raw = client.post("/v1/chat/completions", json=body).content
    assert b": keep-alive\n\n" in raw
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key) as sdk:
        stream = sdk.chat.completions.create(model=BASE, messages=user("xy"), stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "xy"


@pytest.mark.parametrize(("prompt", "code"), [("<fail>......", "generation_failed"), ("<die>......", "engine_died")])
def test_stream_failure_midway_is_an_error_frame(client: OpenAI, gateway: Gateway, prompt: str, code: str) -> None:
    received = []
    with pytest.raises(openai.APIError) as caught:  # noqa: PT012  the chunks before the error count
        for chunk in client.chat.completions.create(model=BASE, messages=user(prompt), stream=True):
            received.append(chunk.choices[0].delta.content)
    assert caught.value.code == code
    assert received == ["", *prompt[:4]]
    assert not any(b"[DONE]" in frame for frame in frames(gateway, messages=user(prompt)))


def test_create_failure_is_a_status(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=BASE, messages=user("<fail>......"))
    assert caught.value.code == "generation_failed"
    assert caught.value.request_id is not None


def test_models_list_and_retrieve(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [BASE, "team/echo-one"]
    assert client.models.retrieve("team/echo-one").owned_by == "loraplex"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("team/none")


async def test_async_client_that_leaves_frees_its_place(gateway: Gateway) -> None:
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key) as client:
        stream = await client.chat.completions.create(model=BASE, messages=user("<slow>" + "y" * 300), stream=True)
        await anext(stream)
        assert gateway.stats().num_running == 1
        aborted = gateway.stats().total_aborted
        await stream.close()
    wait_idle(gateway)
    assert gateway.stats().total_aborted == aborted + 1


def test_client_without_stream_that_leaves_frees_its_place(gateway: Gateway) -> None:
    aborted = gateway.stats().total_aborted
    body = {"model": BASE, "messages": user("<slow>" + "z" * 300)}
    with gateway.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=body, timeout=0.3)
    wait_idle(gateway)
    assert gateway.stats().total_aborted == aborted + 1


def wait_idle(gateway: Gateway, seconds: float = 2.0) -> None:
    deadline = time.monotonic() + seconds
    while gateway.stats().num_running:
        assert time.monotonic() < deadline, "a request that was left runs on"
        time.sleep(0.01)


def test_create_conversation_goes_on_with_the_sdks_own_message(client: OpenAI) -> None:
    """As OpenAI's documentation does it: the answer's message is appended, with all the nulls that stand in it."""
    first = client.chat.completions.create(model=BASE, messages=user("one")).choices[0].message
    for said in (first, first.model_dump()):
        messages: Any = [*user("one"), said, *user("two")]
        answer = client.chat.completions.create(model=BASE, messages=messages)
        assert answer.choices[0].message.content == "one\none\ntwo"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_reasoning_that_is_asked_for_encrypted_comes_open_and_is_read_where_it_comes_back(
    thinking: Gateway, stream: bool
) -> None:
    """As agents ask that keep their conversations themselves."""
    stateless: Any = {"model": BASE, "store": False, "include": ["reasoning.encrypted_content"],
                      "reasoning": {"summary": "auto"}}  # fmt: skip

    said: Any = user("<think>\nWarm?\n</think>\n\nYes.")
    with OpenAI(base_url=f"{thinking.url}/v1", api_key=thinking.api_key, max_retries=0) as client:
        if stream:
            with client.responses.stream(input=said, **stateless) as events:
                answer: Any = events.get_final_response()
        else:
            answer = client.responses.create(input=said, **stateless)
        thought = answer.output[0]
        assert (thought.content[0].text, thought.encrypted_content) == ("Warm?", None)
        again = client.responses.create(input=[*said, *answer.output, *user("And now?")], **stateless)
    assert again.output_text == "Yes.\nYes.\nAnd now?"
