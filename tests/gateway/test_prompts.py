"""Prompts become requests, of an engine that can take them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from support.gateway import BASE, settings_in

from loraplex.auth.caller import Caller
from loraplex.config.settings import Model
from loraplex.engines.echo import EchoEngine
from loraplex.engines.errors import EngineUnavailable
from loraplex.gateway.catalogue import Route
from loraplex.gateway.openai.chat_messages import Message
from loraplex.gateway.openai.chat_wire import ChatRequest
from loraplex.gateway.openai.completions import CompletionRequest
from loraplex.gateway.openai.dialogue import Dialogue
from loraplex.gateway.prompts import LONG_TEXT, chat_requests, completion_requests

CALLER = Caller(tenant_id="t", tenant_name="t", key_id="k", role="inference")
MODEL = Model(path="", name=BASE)
ROUTE = Route(base=BASE, adapter=None)


async def test_engine_not_ready_raises_before_its_tokenizer_is_asked(tmp_path: Path) -> None:
    engine = EchoEngine(settings_in(tmp_path))
    chat = ChatRequest(model=BASE, messages=[Message(role="user", content="x")])
    with pytest.raises(EngineUnavailable, match="starting"):
        Dialogue(chat, engine, MODEL)
    with pytest.raises(EngineUnavailable, match="starting"):
        await completion_requests(CompletionRequest(model=BASE, prompt="x"), "x", "c", ROUTE, CALLER, engine)


@pytest.mark.parametrize(("length", "is_in_loop"), [(10, True), (LONG_TEXT + 1, False)])
async def test_long_prompt_is_tokenised_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, is_in_loop: bool
) -> None:
    engine = EchoEngine(settings_in(tmp_path))
    await engine.start(lambda progress: None)
    places: list[threading.Thread] = []

    def tokenise(*given: object, **named: object) -> list[int]:
        places.append(threading.current_thread())
        return [1]

    monkeypatch.setattr(engine.tokenizer, "encode", tokenise)
    monkeypatch.setattr(engine.tokenizer, "encode_chat", tokenise)
    chat = ChatRequest(model=BASE, messages=[Message(role="user", content="x" * length)])
    await chat_requests(Dialogue(chat, engine, MODEL), "c", ROUTE, CALLER, engine)
    completion = CompletionRequest(model=BASE, prompt="x")
    await completion_requests(completion, ["x" * length], "c", ROUTE, CALLER, engine)
    assert [place is threading.current_thread() for place in places] == [is_in_loop] * 2
