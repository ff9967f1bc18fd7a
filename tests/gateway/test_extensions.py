"""What LoRAX's and vLLM's clients send to OpenAI's routes beyond OpenAI: honoured, or harmless at its neutral value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.asking import asked_by
from support.gateway import BASE, Gateway, settings_in

from loraplex.auth.caller import Caller
from loraplex.config.settings import Model
from loraplex.engines.echo import EchoEngine
from loraplex.engines.protocol import GenerateRequest, Grammar
from loraplex.engines.tokenizer_protocol import Room
from loraplex.gateway.catalogue import Route
from loraplex.gateway.errors import MalformedRequest, UnsupportedParameter
from loraplex.gateway.openai.chat_messages import Message
from loraplex.gateway.openai.chat_wire import AnswerMessage, ChatRequest
from loraplex.gateway.openai.completions import CompletionRequest
from loraplex.gateway.openai.dialogue import Dialogue
from loraplex.gateway.openai.responses_request import ResponseRequest
from loraplex.gateway.prompts import chat_requests, completion_requests

ASKED = asked_by(Caller(tenant_id="t", tenant_name="t", key_id="k", role="inference"))
ROUTE = Route(base=BASE, adapter=None)
MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ANY_OBJECT = {"type": "object"}


@pytest.fixture
async def engine(tmp_path: Path) -> EchoEngine:
    engine = EchoEngine(settings_in(tmp_path))
    await engine.start(lambda progress: None)
    return engine


async def chat_asked(engine: EchoEngine, **fields: Any) -> GenerateRequest:
    """What an engine is asked by a chat with these fields."""
    body = msgspec.json.decode(json.dumps({"messages": MESSAGES, **fields}), type=ChatRequest)
    body.check()
    dialogue = Dialogue(body, engine.tokenizer, Model(path="", name=BASE))
    return (await chat_requests(ASKED, dialogue, "c", ROUTE, engine))[0]


async def text_asked(engine: EchoEngine, **fields: Any) -> GenerateRequest:
    """What an engine is asked by a completion with these fields."""
    body = msgspec.json.decode(json.dumps({"prompt": "hi", **fields}), type=CompletionRequest)
    body.check()
    return (await completion_requests(ASKED, body, body.prompt, "c", ROUTE, engine))[0]


ASKING = pytest.mark.parametrize("asked", [chat_asked, text_asked], ids=["chat", "completion"])


@pytest.mark.parametrize(
    ("schema", "expected"),
    [(SCHEMA, SCHEMA), (json.dumps(SCHEMA), SCHEMA), (None, ANY_OBJECT), ({}, ANY_OBJECT)],
    ids=["object", "text", "null", "empty"],
)
def test_json_object_keeps_to_the_schema_beside_it(schema: Any, expected: Any) -> None:
    said = {"type": "json_object", "schema": schema}
    chat = msgspec.convert({"messages": MESSAGES, "response_format": said}, ChatRequest)
    response = msgspec.convert({"input": "hi", "text": {"format": said}}, ResponseRequest).chat([])
    for body in (chat, response):
        form = body.form()
        assert form is not None
        assert (form[0], form[1].kind, json.loads(form[1].source)) == ("response_format", "json_schema", expected)


def test_json_object_alone_is_any_object() -> None:
    body = msgspec.convert({"messages": MESSAGES, "response_format": {"type": "json_object"}}, ChatRequest)
    assert body.form() == ("response_format", Grammar(kind="json_schema", source=json.dumps(ANY_OBJECT)))


@ASKING
async def test_lorax_name_for_going_on_behind_the_end(engine: EchoEngine, asked: Any) -> None:
    assert (await asked(engine, ignore_eos_token=True)).sampling.ignore_eos is True
    assert (await asked(engine, ignore_eos_token=False)).sampling.ignore_eos is False


@ASKING
@pytest.mark.parametrize(
    ("top_p", "expected"), [(0, (1, 1.0)), (0.0, (1, 1.0)), (0.5, (40, 0.5)), (1, (40, 1.0))], ids=str
)
async def test_top_p_of_nothing_leaves_the_likeliest_token(
    engine: EchoEngine, asked: Any, top_p: float, expected: tuple[int, float]
) -> None:
    sampling = (await asked(engine, top_p=top_p, top_k=40)).sampling
    assert (sampling.top_k, sampling.top_p) == expected


@ASKING
async def test_tokens_that_are_allowed(engine: EchoEngine, asked: Any) -> None:
    assert (await asked(engine, allowed_token_ids=[1, 256])).sampling.allowed_token_ids == (1, 256)


@ASKING
async def test_sixteen_stop_strings(engine: EchoEngine, asked: Any) -> None:
    stops = [f"<{number}>" for number in range(16)]
    assert (await asked(engine, stop=stops)).sampling.stop == tuple(stops)
    response = msgspec.convert({"input": "hi", "stop": stops}, ResponseRequest)
    assert response.chat([]).stop == stops


@ASKING
@pytest.mark.parametrize(
    ("most", "max_tokens", "expected"),
    [(4, 5, "6789"), (100, 5, "0123456789"), (-1, 5, "0123456789"), (None, 5, "0123456789"), (-1, 509, "789")],
)
async def test_prompt_is_cut_from_its_beginning(
    engine: EchoEngine, asked: Any, most: int | None, max_tokens: int, expected: str
) -> None:
    """The context of the echo engine here is 512 tokens, each of them a character."""
    digits = {"messages": [{"role": "user", "content": "0123456789"}], "prompt": "0123456789"}
    own = "messages" if asked is chat_asked else "prompt"
    made = await asked(engine, truncate_prompt_tokens=most, max_tokens=max_tokens, **{own: digits[own]})
    assert engine.tokenizer.decode(made.prompt_token_ids) == expected


def test_embedded_text_is_cut_from_its_beginning(gateway: Gateway) -> None:
    with gateway.client() as client:

        def embed(**fields: Any) -> Any:
            return client.post("/v1/embeddings", json={"model": BASE, **fields}).json()

        long = "x" * 1000 + "6789"
        assert embed(input=long, truncate_prompt_tokens=4)["data"] == embed(input="6789")["data"]
        assert embed(input=long, truncate_prompt_tokens=-1)["data"] == embed(input=long[-512:])["data"]
        assert embed(input=long, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 512
        assert embed(input=long)["error"]["code"] == "context_length_exceeded"
        assert embed(input=long, truncate_prompt_tokens=0)["error"]["param"] == "truncate_prompt_tokens"


@pytest.mark.parametrize(("special", "num_tokens"), [(True, 2), (False, 1), (None, 2)], ids=str)
def test_completion_says_whether_its_prompt_gets_special_tokens(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, special: bool | None, num_tokens: int
) -> None:
    def encode(text: str, *, add_special_tokens: bool = True, room: Room | None = None) -> list[int]:
        return [1] * add_special_tokens + [2]

    monkeypatch.setattr(gateway.services.engine.tokenizer, "encode", encode)
    with gateway.client() as client:
        body = {"model": BASE, "prompt": "hi", "add_special_tokens": special}
        answer = client.post("/v1/completions", json=body).json()
    assert answer["usage"]["prompt_tokens"] == num_tokens


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
async def test_model_that_does_not_reason_may_be_told_not_to(
    engine: EchoEngine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(type(engine.tokenizer), "template_variables", frozenset({"tools"}))
    await chat_asked(engine, chat_template_kwargs={name: False})
    with pytest.raises(UnsupportedParameter, match=name):
        await chat_asked(engine, chat_template_kwargs={name: True})


async def test_cache_control_is_no_part_of_what_is_said(engine: EchoEngine) -> None:
    parts = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "!"}]
    made = await chat_asked(engine, messages=[{"role": "user", "content": parts}])
    assert engine.tokenizer.decode(made.prompt_token_ids) == "hi!"


@pytest.mark.parametrize("names", [("reasoning_content",), ("reasoning",), ("reasoning_content", "reasoning")], ids=str)
def test_reasoning_of_the_history_reaches_the_template_by_either_name(names: tuple[str, ...]) -> None:
    said = {"role": "assistant", "content": "b", **dict.fromkeys(names, "c")}
    message = msgspec.convert(said, Message)
    message.check("messages[0]")
    assert message.for_template().reasoning_content == "c"


def test_reasoning_that_is_said_in_two_ways_is_refused_by_name() -> None:
    message = Message(role="assistant", content="b", reasoning_content="c", reasoning="d")
    with pytest.raises(MalformedRequest) as refused:
        message.check("messages[0]")
    assert refused.value.param == "messages[0].reasoning"


def test_answer_that_reasoned_goes_back_as_it_is() -> None:
    answer = AnswerMessage("b", reasoning_content="c", reasoning="c")
    message = msgspec.json.decode(msgspec.json.encode(answer), type=Message)
    message.check("messages[0]")
    assert message.for_template().reasoning_content == "c"


NEUTRAL = {
    "priority": 0, "use_beam_search": False, "length_penalty": 1.0, "spaces_between_special_tokens": True,
    "guided_decoding_backend": "xgrammar", "kv_transfer_params": None, "vllm_xargs": None, "logits_processors": None,
    "return_tokens_as_token_ids": False, "guided_choice": None, "truncation_side": "left", "stream_interval": 1,
    "thinking_token_budget": None, "repetition_detection": None, "logprob_token_ids": None, "prompt_embeds": None,
    "ec_transfer_params": None, "guided_whitespace_pattern": None, "watermarking": None, "return_prompt_text": False,
}  # fmt: skip
NEUTRAL_OF_CHATS = {
    "include_reasoning": True, "best_of": 1, "echo": False, "add_special_tokens": False, "documents": None,
    "mm_processor_kwargs": None, "media_io_kwargs": None,
}  # fmt: skip


def test_what_clients_of_vllm_send_of_themselves_is_taken(gateway: Gateway) -> None:
    with gateway.client() as client:
        chat = {"model": BASE, "messages": MESSAGES, **NEUTRAL, **NEUTRAL_OF_CHATS}
        assert client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"] == "hi"
        text = {"model": BASE, "prompt": "hi", **NEUTRAL}
        assert client.post("/v1/completions", json=text).json()["choices"][0]["text"] == "hi"
        said = {"model": BASE, "input": "hi", "priority": 0}
        vectors = {**said, "add_special_tokens": True, "truncation_side": "left", "embed_dtype": "float32"}
        assert len(client.post("/v1/embeddings", json=vectors).json()["data"]) == 1
        honoured = {"ignore_eos": False, "stop_token_ids": [3], "skip_special_tokens": True, "min_tokens": 1}
        answer = client.post("/v1/responses", json={**said, **honoured, "include_reasoning": True})
        assert answer.json()["output"][0]["content"][0]["text"] == "hi", answer.text
        form = {"choice": ["hi"], "disable_any_whitespace": False, "whitespace_pattern": None}
        answer = client.post("/v1/chat/completions", json={**chat, "structured_outputs": form})
        assert answer.status_code == 200, answer.text
