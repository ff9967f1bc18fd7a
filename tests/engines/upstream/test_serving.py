"""What an upstream computes is told as it would tell it itself; the oracle is that upstream, asked directly."""

from __future__ import annotations

from typing import Any

import pytest
from openai import BadRequestError
from support.upstream import BASE, Pair, client_of

QUESTION = [{"role": "user", "content": "Where does Anna work?"}]
SCHEMA = {
    "type": "object", "properties": {"place": {"enum": ["bakery", "school"]}}, "required": ["place"],
    "additionalProperties": False,
}  # fmt: skip
CHATS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "two choices drawn": {"temperature": 0.9, "seed": 7, "n": 2, "extra_body": {"top_k": 20, "min_p": 0.01}},
    "log-probabilities": {"logprobs": True, "top_logprobs": 3},
    "none beside": {"logprobs": True, "top_logprobs": 0},
    "stop string": {"stop": ["bak"]},
    "stop string kept": {"stop": ["bak"], "extra_body": {"include_stop_str_in_output": True}},
    "cut": {"max_tokens": 3},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 0.5, "extra_body": {"repetition_penalty": 1.2}},
    "bad words": {"extra_body": {"bad_words": ["bakery"]}, "max_tokens": 12},
    "behind the end": {"extra_body": {"ignore_eos": True, "skip_special_tokens": False}, "max_tokens": 24},
    "not at once": {"extra_body": {"min_tokens": 12}, "max_tokens": 20},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    "choice": {"extra_body": {"structured_outputs": {"choice": ["bakery", "school"]}}},
}
TEXTS: dict[str, dict[str, Any]] = {
    "log-probabilities": {"logprobs": 2},
    "of the prompt": {"logprobs": 2, "echo": True},
    "of the prompt alone": {"extra_body": {"prompt_logprobs": 2}},
    "stop token": {"extra_body": {"stop_token_ids": [300, 301, 302, 303, 304, 305], "return_token_ids": True}},
    "token ids": {"extra_body": {"return_token_ids": True}},
    "allowed": {"extra_body": {"allowed_token_ids": [300, 301, 302]}, "max_tokens": 6},
    "biased": {"logit_bias": {"301": 50}, "max_tokens": 4},
}
OWN = {"id", "created", "system_fingerprint", "usage"}


def told(answer: Any) -> dict[str, Any]:
    """Without what is each server's own, and to the digits that two float32 sums of one value share."""
    return {name: _rounded(value) for name, value in answer.model_dump().items() if name not in OWN}


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return round(value, 3)
        case dict():
            return {name: _rounded(one) for name, one in value.items()}
        case list():
            return [_rounded(one) for one in value]
    return value


@pytest.mark.parametrize("case", CHATS)
def test_chat_is_the_upstreams_own(demo: Pair, case: str) -> None:
    body: dict[str, Any] = {"model": BASE, "messages": QUESTION, "temperature": 0, "max_tokens": 40, **CHATS[case]}
    ours, theirs = (client_of(gateway).chat.completions.create(**body) for gateway in (demo.front, demo.upstream))
    assert told(ours) == told(theirs)
    assert ours.choices[0].message.content
    assert ours.usage.completion_tokens == theirs.usage.completion_tokens
    assert ours.usage.prompt_tokens == theirs.usage.prompt_tokens


@pytest.mark.parametrize("case", TEXTS)
def test_completion_is_the_upstreams_own(demo: Pair, case: str) -> None:
    body: dict[str, Any] = {"model": BASE, "prompt": "Anna works at", "temperature": 0, "max_tokens": 12, **TEXTS[case]}
    ours, theirs = (client_of(gateway).completions.create(**body) for gateway in (demo.front, demo.upstream))
    assert told(ours) == told(theirs)
    assert ours.usage.completion_tokens == theirs.usage.completion_tokens


def test_streams_are_the_upstreams_own(demo: Pair) -> None:
    body: dict[str, Any] = {"model": "pirate", "messages": QUESTION, "temperature": 0, "stream": True, "logprobs": True}
    streams = []
    for gateway in (demo.front, demo.upstream):
        chunks = list(client_of(gateway).chat.completions.create(**body, stream_options={"include_usage": True}))
        streams.append([told(chunk) for chunk in chunks])
        assert chunks[-1].usage.completion_tokens > 5
    assert streams[0] == streams[1]
    assert len(streams[0]) > 5


@pytest.mark.parametrize("name", ["pirate", "json", "spanish"])
def test_adapter_answers_as_it_does_there(demo: Pair, name: str) -> None:
    body: dict[str, Any] = {"messages": QUESTION, "temperature": 0, "max_tokens": 40}
    ours, theirs, base = (
        client_of(gateway).chat.completions.create(model=model, **body).choices[0].message.content
        for gateway, model in ((demo.front, name), (demo.upstream, name), (demo.upstream, BASE))
    )
    assert ours == theirs != base


def test_embeddings_are_the_upstreams_own(demo: Pair) -> None:
    cases: list[dict[str, Any]] = [{}, {"extra_body": {"pooling": "last", "normalize": False}}]
    for options in cases:
        ours, theirs = (
            client_of(gateway).embeddings.create(model="pirate", input="Anna", encoding_format="float", **options)
            for gateway in (demo.front, demo.upstream)
        )
        assert ours.data[0].embedding == pytest.approx(theirs.data[0].embedding, abs=1e-4)


def test_prompt_begins_in_the_upstreams_cache_for_its_tenant_alone(demo: Pair) -> None:
    body: dict[str, Any] = {"model": BASE, "prompt": "Once upon a time " * 12, "max_tokens": 1, "temperature": 0}
    _, other_key = demo.front.new_tenant("another")
    cached = []
    for key in (demo.front.api_key, demo.front.api_key, other_key):
        usage = client_of(demo.front).with_options(api_key=key).completions.create(**body).usage
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == cached[2] == 0 < cached[1]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"typical_p": 0.5}, "typical_p"),
        ({"adapters": [{"model": "pirate"}, {"model": "json"}]}, "adapters"),
        ({"bad_words": [" "]}, "bad_words"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_an_upstream_cannot_do_is_refused_by_name(demo: Pair, body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        client_of(demo.front).completions.create(model=BASE, prompt="x", max_tokens=1, extra_body=body)
    assert refused.value.param == param


def test_models_and_engine_are_described(demo: Pair) -> None:
    info = demo.front.services.engine.info()
    theirs = demo.upstream.services.engine.info()
    assert (info.engine, info.device) == ("upstream", demo.upstream.url.removeprefix("http://"))
    for name in ("max_model_len", "vocab_size", "architecture", "embedding_width"):
        assert getattr(info, name) == getattr(theirs, name)
