"""What LoRAX's and vLLM's clients send to OpenAI's routes beyond OpenAI: honoured, or harmless at its neutral value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.gateway import BASE, settings_in

from loraplex.auth.caller import Caller
from loraplex.config.settings import Model
from loraplex.engines.echo import EchoEngine
from loraplex.engines.protocol import GenerateRequest, Grammar
from loraplex.gateway.catalogue import Route
from loraplex.gateway.openai.chat_wire import ChatRequest
from loraplex.gateway.openai.completions import CompletionRequest
from loraplex.gateway.openai.dialogue import Dialogue
from loraplex.gateway.openai.responses_request import ResponseRequest
from loraplex.gateway.prompts import chat_requests, completion_requests

CALLER = Caller(tenant_id="t", tenant_name="t", key_id="k", role="inference")
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
    body = msgspec.convert({"messages": MESSAGES, **fields}, ChatRequest)
    body.check()
    dialogue = Dialogue(body, engine.tokenizer, Model(path="", name=BASE))
    return (await chat_requests(dialogue, "c", ROUTE, CALLER, engine))[0]


async def text_asked(engine: EchoEngine, **fields: Any) -> GenerateRequest:
    """What an engine is asked by a completion with these fields."""
    body = msgspec.convert({"prompt": "hi", **fields}, CompletionRequest)
    body.check()
    return (await completion_requests(body, body.prompt, "c", ROUTE, CALLER, engine))[0]


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
