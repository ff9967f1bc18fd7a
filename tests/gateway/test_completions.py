"""/v1/completions with the official SDK: text continues as the echo engine echoes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from openai import OpenAI
from openai.types import Completion
from support.gateway import BASE, Gateway
from support.problems import assert_problem

from loraplex.config.settings import EngineSettings
from loraplex.engines.protocol import GenerateRequest, TokenEvent
from loraplex.gateway.turns import parts_at_once


@pytest.fixture
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0) as client:
        yield client


def test_text_continues_up_to_sixteen_tokens_unless_told(client: OpenAI) -> None:
    answer = client.completions.create(model=BASE, prompt="0123456789abcdefXYZ")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("0123456789abcdef", "length")
    answer = client.completions.create(model=BASE, prompt="0123456789abcdefXYZ", max_tokens=30)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("0123456789abcdefXYZ", "stop")


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("ab", ["ab"]), (["ab", "c"], ["ab", "c"]), ([104, 105], ["hi"]), ([[104], [105, 33]], ["h", "i!"])],
    ids=str,
)
def test_prompt_in_each_form(client: OpenAI, prompt: Any, texts: list[str]) -> None:
    answer = client.completions.create(model=BASE, prompt=prompt, n=2)
    assert [choice.text for choice in answer.choices] == [text for text in texts for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(2 * len(texts)))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(text) for text in texts)


def test_stream_and_logprobs(client: OpenAI) -> None:
    stream = client.completions.create(
        model=BASE, prompt="hé", stream=True, logprobs=1, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "hé"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    whole = client.completions.create(model=BASE, prompt="abc", logprobs=2)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.text_offset) == (["a", "b", "c"], [0, 1, 2])
    assert logprobs.top_logprobs == [{"a": 0.0}, {"b": 0.0}, {"c": 0.0}]


def test_chunks_are_strictly_the_sdks_type(gateway: Gateway) -> None:
    body = {"model": BASE, "prompt": "ab", "logprobs": 1}
    with gateway.client() as client:
        raw = client.post("/v1/completions", json={**body, "stream": True}).content
        whole = client.post("/v1/completions", json=body)
    Completion.model_validate_json(whole.content, strict=True)
    frames = raw.removesuffix(b"\n\n").split(b"\n\n")
    assert frames[-1] == b"data: [DONE]"
    for frame in frames[:-1]:
        chunk = json.loads(frame.removeprefix(b"data: "))
        assert chunk["object"] == "text_completion"
        assert "usage" not in chunk


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"prompt": ""}, "invalid_request", "prompt"),
        ({"prompt": []}, "invalid_request", "prompt"),
        ({"prompt": [[]]}, "invalid_request", "prompt"),
        ({"prompt": ["a", 5]}, "invalid_request", "prompt"),
        ({"prompt": [257]}, "invalid_request", "prompt"),
        ({"prompt": 5}, "invalid_request", "prompt"),
        ({"prompt": "x" * 512}, "context_length_exceeded", "prompt"),
        ({"max_tokens": -1}, "invalid_request", "max_tokens"),
        ({"max_tokens": 0, "min_tokens": 1}, "invalid_request", "min_tokens"),
        ({"max_tokens": 600}, "context_length_exceeded", "max_tokens"),
        ({"logprobs": 21}, "invalid_request", "logprobs"),
        ({"echo": 1}, "invalid_request", "echo"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"best_of": 2, "n": 3}, "invalid_request", "best_of"),
        ({"best_of": 2, "stream": True}, "invalid_request", "best_of"),
        ({"messages": []}, "unknown_parameter", "messages"),
    ],
    ids=str,
)
def test_field_wrong_is_refused_by_name(gateway: Gateway, changes: dict[str, Any], code: str, param: str) -> None:
    with gateway.client() as client:
        response = client.post("/v1/completions", json={"model": BASE, "prompt": "x", **changes})
    assert_problem(response, 400, code, param)


def test_prompt_given_twice_counts_twice_and_its_choices_once(client: OpenAI) -> None:
    answer = client.completions.create(model=BASE, prompt=["abc", "abc"], n=3)
    assert answer.usage is not None
    assert (len(answer.choices), answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 6, 24)


def test_prompts_beyond_the_limit_are_refused_before_any_runs(gateway: Gateway) -> None:
    before = gateway.stats().total_prompt_tokens
    with gateway.client() as client:
        for prompt, n in (([[1]] * 2049, 1), (["a"] * 17, 128)):
            response = client.post("/v1/completions", json={"model": BASE, "prompt": prompt, "n": n})
            assert "2048" in assert_problem(response, 400, "invalid_request", "prompt")
    assert gateway.stats().total_prompt_tokens == before


def scored(client: OpenAI, prompt: Any, **fields: Any) -> list[tuple[str, Any]]:
    """Of each choice the text and the log-probabilities, told at once; streamed they must come to the same."""
    whole = client.completions.create(model=BASE, prompt=prompt, echo=True, logprobs=1, **fields)
    told = [(choice.text, choice.logprobs) for choice in whole.choices]
    texts, lists = [""] * len(told), [{} for _ in told]  # type: ignore[var-annotated]
    for chunk in client.completions.create(model=BASE, prompt=prompt, echo=True, logprobs=1, stream=True, **fields):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            for name, entries in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                lists[choice.index].setdefault(name, []).extend(entries)
    assert texts == [text for text, _ in told]
    assert lists == [logprobs.model_dump() if logprobs else {} for _, logprobs in told]
    return told


def test_echoed_prompt_of_one_token_has_its_entry(client: OpenAI) -> None:
    for prompt in ("a", [97]):
        [(text, logprobs)] = scored(client, prompt, max_tokens=1)
        assert (text, logprobs.tokens, logprobs.text_offset) == ("aa", ["a", "a"], [0, 1])
        assert (logprobs.token_logprobs, logprobs.top_logprobs) == ([None, 0.0], [None, {"a": 0.0}])
    (_, first), (_, second) = scored(client, [[97], [98, 99]], max_tokens=1)
    assert (first.tokens, first.token_logprobs) == (["a", "a"], [None, 0.0])
    assert (second.tokens, second.token_logprobs) == (["b", "c", "b"], [None, 0.0, 0.0])


def test_offsets_are_places_in_the_text_behind_parts_of_characters_and_special_tokens(client: OpenAI) -> None:
    end = 256  # the echo's special token, whose name is no part of the text
    [(text, logprobs)] = scored(client, [end, *"é😀x".encode(), end, 121], max_tokens=1)
    assert text.startswith("é😀xy")
    assert logprobs.text_offset == [0, 0, 0, 1, 1, 1, 1, 2, 3, 3, 4]
    assert logprobs.tokens[:8] == [
        "<eos>", r"bytes:\xc3", r"bytes:\xa9", r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\x80", "x",
    ]  # fmt: skip
    assert logprobs.top_logprobs[4] == {r"bytes:\x9f": 0.0}


def test_no_tokens_asked_for_tell_the_prompt_alone(client: OpenAI, gateway: Gateway) -> None:
    """Evaluation harnesses score prompts so."""
    [(text, logprobs)] = scored(client, "abc", max_tokens=0)
    assert (text, logprobs.tokens, logprobs.text_offset) == ("abc", ["a", "b", "c"], [0, 1, 2])
    assert logprobs.token_logprobs == [None, 0.0, 0.0]
    (_, first), (_, second) = scored(client, [[97], [98, 99]], max_tokens=0)
    assert (first.tokens, first.token_logprobs) == (["a"], [None])
    assert (second.tokens, second.token_logprobs) == (["b", "c"], [None, 0.0])
    for stop in (None, ["a"]):  # nothing that speaks of generated tokens matters
        whole = client.completions.create(model=BASE, prompt="abc", max_tokens=0, n=2, best_of=3, stop=stop)
        assert [(choice.text, choice.finish_reason) for choice in whole.choices] == [("", "length")] * 2
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (3, 0, 3)
    chunks = list(client.completions.create(model=BASE, prompt="abc", max_tokens=0, stream=True))
    assert [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in chunks] == [("", "length")]
    tenant, key = gateway.new_tenant("scores")
    with gateway.client(key) as own, gateway.admin() as admin:
        assert own.post("/v1/completions", json={"model": BASE, "prompt": "abc", "max_tokens": 0}).status_code == 200
        [row] = admin.get("/admin/v1/usage", params={"tenant_id": tenant}).json()["data"]
    assert (row["num_prompt_tokens"], row["num_completion_tokens"]) == (3, 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("num_prompts", "n"), [(1200, 1), (16, 128)])
def test_request_of_many_answers_is_the_engines_a_part_at_a_time(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, num_prompts: int, n: int, stream: bool
) -> None:
    engine = gateway.services.engine
    generate, started, running, most = engine.generate, [], 0, 0

    async def counting(request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        nonlocal running, most
        started.append(tuple(int(part) for part in request.request_id.split("-")[2:]))
        running += 1
        most = max(most, running)
        try:
            async for event in generate(request):
                yield event
        finally:
            running -= 1

    monkeypatch.setattr(engine, "generate", counting)
    body = {"model": BASE, "prompt": [[97, 98]] * num_prompts, "n": n, "max_tokens": 2, "stream": stream}
    with gateway.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    frames = [json.loads(frame[6:]) for frame in response.text.split("\n\n")[:-2]] if stream else [response.json()]
    texts: dict[int, str] = {}
    for choice in (choice for frame in frames for choice in frame["choices"]):
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == dict.fromkeys(range(num_prompts * n), "ab")
    assert started == [(place, number) for place in range(num_prompts) for number in range(n)]
    assert most == parts_at_once(EngineSettings())


def test_stop_is_cut_or_included(client: OpenAI) -> None:
    answer = client.completions.create(model=BASE, prompt="one. two", stop=".")
    assert answer.choices[0].text == "one"
    extra = {"include_stop_str_in_output": True}
    answer = client.completions.create(model=BASE, prompt="one. two", stop=".", extra_body=extra)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one.", "stop")


@pytest.mark.parametrize(("min_tokens", "text"), [(0, "a"), (1, "a"), (2, "a.b"), (3, "a.b"), (4, "a.b.c")])
def test_stop_waits_for_the_least_tokens(client: OpenAI, min_tokens: int, text: str) -> None:
    answer = client.completions.create(model=BASE, prompt="a.b.c", stop=".", extra_body={"min_tokens": min_tokens})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "stop")
