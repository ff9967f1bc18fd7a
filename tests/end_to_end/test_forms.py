"""Answers that must have a form, and completions that show their prompt, through the unmodified OpenAI SDK."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from pydantic import BaseModel, Field
from support.demo import Demo
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.config.demo import MODEL_DIR, adapter_names

ASK: Any = [{"role": "user", "content": "Where does Anna work?"}]


class Place(BaseModel):
    person: Literal["Anna", "Ben"]
    town: Annotated[str, Field(max_length=12)]
    visits: Annotated[list[Annotated[int, Field(ge=0, le=99)]], Field(max_length=3)]


class Trip(BaseModel):
    places: Annotated[list[Place], Field(max_length=2)]
    paid: bool | None


@pytest.fixture
def client(demo: Demo) -> Iterator[OpenAI]:
    with OpenAI(base_url=demo.base_url, api_key=demo.api_key, max_retries=0) as client:
        yield client


@pytest.fixture
def model(client: OpenAI) -> str:
    return client.models.list().data[0].id


@pytest.mark.parametrize("number", range(2))
def test_sdk_parses_answers_into_pydantic_models(client: OpenAI, number: int) -> None:
    name = adapter_names()[number]
    for form in (Place, Trip):
        answer = client.chat.completions.parse(
            model=name, messages=ASK, response_format=form, temperature=0.5, seed=number, max_tokens=200,
            logit_bias=_towards_ends(),
        )  # fmt: skip
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, form)


def _towards_ends() -> dict[str, int]:
    """Towards the tokens that end strings, lists and objects: the demo's small model rarely thinks of them."""
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR)
    ends = [id for token, id in tokenizer.get_vocab().items() if set(token) & set('"]}') or token == "null"]
    return {str(token): 12 for token in ends}


@pytest.mark.parametrize(
    ("body", "form"),
    [
        ({"guided_regex": "[A-Z][a-z]{2,5} [0-9]{2}"}, "[A-Z][a-z]{2,5} [0-9]{2}"),
        ({"guided_choice": ["the bakery", "the school"]}, "the (bakery|school)"),
        ({"guided_grammar": 'start: "I " ("do" | "do not") " know"'}, "I do( not)? know"),
        ({"guided_grammar": 'root ::= "a" [0-9] [0-9]'}, "a[0-9][0-9]"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"json": {"const": [1, 2]}}}, r"\[\s*1,\s*2\s*\]"),
    ],
    ids=str,
)
def test_form_streamed_and_whole_is_kept(client: OpenAI, model: str, body: dict[str, Any], form: str) -> None:
    options: Any = {"model": model, "messages": ASK, "extra_body": body, "temperature": 0, "max_tokens": 60}
    whole = client.chat.completions.create(**options).choices[0].message.content
    streamed = "".join(
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(stream=True, **options)
    )
    assert whole == streamed
    assert re.fullmatch(form, whole or "")


def test_json_object_is_one(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=ASK, response_format={"type": "json_object"}, temperature=0, max_tokens=200,
        logit_bias=_towards_ends(),
    )  # fmt: skip
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_bad_schema_names_the_field_and_the_reason(client: OpenAI, model: str) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="objekt") as caught:
            client.chat.completions.create(model=model, messages=ASK, response_format=schema, stream=stream)
        assert caught.value.param == "response_format"


def test_bad_words_do_not_appear(client: OpenAI, model: str) -> None:
    options: Any = {"model": model, "messages": ASK, "temperature": 0, "max_tokens": 20}
    plain = client.chat.completions.create(**options).choices[0].message.content or ""
    assert "bakery" in plain
    other = client.chat.completions.create(extra_body={"bad_words": ["bakery"]}, **options)
    assert "bakery" not in (other.choices[0].message.content or "bakery")


@pytest.mark.parametrize("stream", [False, True])
def test_echo_tells_the_prompts_log_probabilities_as_transformers_has_them(
    client: OpenAI, model: str, stream: bool
) -> None:
    prompt = "Anna works at the"
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR)
    oracle: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    answer: Any = client.completions.create(
        model=model, prompt=prompt, echo=True, logprobs=2, max_tokens=3, temperature=0, stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    told = [choice.logprobs for choice in choices if choice.logprobs is not None]
    tokens, logprobs = ([one for part in told for one in getattr(part, name)] for name in ("tokens", "token_logprobs"))
    text = "".join(choice.text for choice in choices)
    assert text.startswith(prompt)
    assert "".join(tokens) == text
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        table = oracle.eval()(ids).logits[0].log_softmax(-1)
    expected = [float(table[place, token]) for place, token in enumerate(ids[0, 1:])]
    assert logprobs[0] is None
    assert logprobs[1:] == pytest.approx(expected, abs=2e-3)
    offsets = [offset for part in told for offset in part.text_offset]
    assert [text[begin : begin + len(token)] for begin, token in zip(offsets, tokens, strict=True)] == tokens


def test_chat_tells_the_prompts_chances_as_transformers_has_them(client: OpenAI, model: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR)
    oracle: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    extra = {"prompt_logprobs": 3, "return_token_ids": True}
    answer: Any = client.chat.completions.create(model=model, messages=ASK, max_tokens=2, extra_body=extra)
    ids = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert answer.prompt_token_ids == ids[0].tolist()
    with torch.no_grad():
        table = oracle.eval()(ids).logits[0].log_softmax(-1)
    assert answer.prompt_logprobs[0] is None
    for place, token in enumerate(ids[0, 1:].tolist()):
        told = answer.prompt_logprobs[place + 1]
        likeliest = table[place].topk(3).indices.tolist()
        expected = {str(one): float(table[place, one]) for one in (token, *likeliest)}
        assert {one: said["logprob"] for one, said in told.items()} == pytest.approx(expected, abs=2e-3)
        assert [told[str(one)]["rank"] for one in likeliest] == [1, 2, 3]
        assert told[str(token)]["rank"] == (likeliest.index(token) + 1 if token in likeliest else None)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_token_that_is_met_is_told_by_its_id(client: OpenAI, model: str, stream: bool) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR)
    options: Any = {"model": model, "messages": ASK, "temperature": 0, "max_tokens": 20}
    plain: Any = client.chat.completions.create(extra_body={"return_token_ids": True}, **options)
    made = plain.choices[0].token_ids
    assert made[-1] == tokenizer.eos_token_id
    for stops, ended_by, num_tokens in (([made[3], made[-1]], made[3], 4), ([made[-1]], None, len(made))):
        extra = {"stop_token_ids": stops, "return_token_ids": True}
        answer: Any = client.chat.completions.create(extra_body=extra, stream=stream, **options)
        choices = [chunk.choices[0] for chunk in (answer if stream else [answer])]
        assert (choices[-1].finish_reason, choices[-1].stop_reason) == ("stop", ended_by)
        ids = [token for choice in choices for token in getattr(choice, "token_ids", None) or []]
        assert ids == made[:num_tokens]
    extra = {"stop_token_ids": [made[-1]], "ignore_eos": True}
    answer = client.chat.completions.create(extra_body=extra, **options)
    assert answer.choices[0].stop_reason == made[-1]


def test_best_of_tells_the_likeliest(client: OpenAI, model: str) -> None:
    options: Any = {"model": model, "prompt": "Anna works", "temperature": 1.5, "seed": 5, "max_tokens": 6}
    every = client.completions.create(n=5, logprobs=0, **options)
    ranked = []
    for choice in every.choices:
        assert choice.logprobs is not None
        found = [one for one in choice.logprobs.token_logprobs or [] if one is not None]
        ranked.append((-sum(found) / len(found), choice.text))
    best = client.completions.create(n=2, best_of=5, **options)
    assert [choice.text for choice in best.choices] == [text for _, text in sorted(ranked)[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None
    assert best.usage is not None
    assert every.usage is not None
    assert best.usage.completion_tokens == every.usage.completion_tokens
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(n=3, best_of=2, **options)
    assert caught.value.param == "best_of"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(best_of=2, stream=True, **options)
    assert caught.value.param == "best_of"


def test_request_past_its_own_timeout_is_504_and_the_next_one_is_served(client: OpenAI, model: str) -> None:
    options: Any = {"model": model, "messages": ASK, "temperature": 0}
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(max_tokens=400, extra_body={"timeout_seconds": 0.001}, **options)
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert client.chat.completions.create(max_tokens=5, **options).choices[0].message.content


@pytest.mark.parametrize("shares", [True, False])
def test_tenants_share_prefixes_only_where_both_say_so(demo: Demo, model: str, shares: bool) -> None:
    """What another tenant's prompt computed shows in `cached_tokens`, or does not."""
    keys = []
    with httpx.Client(base_url=demo.root, headers=_bearer(demo.admin_key)) as admin:
        for number in range(2):
            body = {"name": f"shares-{shares}-{number}", "limits": {"shares_prefixes": shares}}
            tenant = admin.post("/admin/v1/tenants", json=body).json()["id"]
            keys.append(admin.post(f"/admin/v1/tenants/{tenant}/keys", json={}).json()["key"])
    messages: Any = [{"role": "user", "content": f"Where does Anna work? {shares} " * 8}]
    cached = []
    for key in [keys[0], *keys]:
        with OpenAI(base_url=demo.base_url, api_key=key) as client:
            usage = client.chat.completions.create(model=model, messages=messages, max_tokens=2).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens or 0)
    assert cached[0] == 0
    assert cached[1] > 16
    assert cached[2] == (cached[1] if shares else 0)


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
