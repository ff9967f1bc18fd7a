"""Prompts become tokens: long ones beside the event loop, so that nobody else's stream waits for them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support.gateway import BASE, settings_in

from loraplex.auth.caller import Caller
from loraplex.engines.echo import EchoEngine, EchoTokenizer
from loraplex.engines.errors import EngineUnavailable, PromptTooLong
from loraplex.gateway.catalogue import Route
from loraplex.gateway.openai.chat_wire import ChatRequest, Message
from loraplex.gateway.openai.completions import CompletionRequest
from loraplex.gateway.prompts import LONG_CHARACTERS, chat_requests, completion_requests

CALLER = Caller(tenant_id="t", tenant_name="t", key_id="k", role="inference")
ROUTE = Route(base=BASE, adapter=None)


@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> EchoEngine:
    engine = EchoEngine(settings_in(tmp_path))
    await engine.start(lambda _: None)
    return engine


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize(("length", "beside"), [(LONG_CHARACTERS, False), (LONG_CHARACTERS + 1, True)])
async def test_long_prompt_is_tokenised_beside_the_loop(
    engine: EchoEngine, monkeypatch: pytest.MonkeyPatch, kind: str, length: int, beside: bool
) -> None:
    threads: list[threading.Thread] = []
    encode = EchoTokenizer.encode

    def recorded(self: EchoTokenizer, *arguments: Any, **options: Any) -> list[int]:
        threads.append(threading.current_thread())
        return encode(self, *arguments, **options)

    monkeypatch.setattr(EchoTokenizer, "encode", recorded)
    text = "x" * length
    chat = ChatRequest(model=BASE, messages=[Message(role="user", content=text)])
    requests = {
        "chat": lambda: chat_requests(chat, "c", ROUTE, CALLER, engine),
        "completion": lambda: completion_requests(
            CompletionRequest(model=BASE, prompt=text), text, "c", ROUTE, CALLER, engine
        ),
    }
    with pytest.raises(PromptTooLong):
        await requests[kind]()
    assert [thread is not threading.main_thread() for thread in threads] == [beside]


async def test_engine_not_ready_raises_before_its_tokenizer_is_asked(tmp_path: Path) -> None:
    body = ChatRequest(model=BASE, messages=[Message(role="user", content="x")])
    with pytest.raises(EngineUnavailable, match="starting"):
        await chat_requests(body, "c", ROUTE, CALLER, EchoEngine(settings_in(tmp_path)))
