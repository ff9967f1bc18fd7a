"""Prompts become requests, of an engine that can take them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.gateway import BASE, settings_in

from loraplex.auth.caller import Caller
from loraplex.engines.echo import EchoEngine
from loraplex.engines.errors import EngineUnavailable
from loraplex.gateway.catalogue import Route
from loraplex.gateway.openai.chat_wire import ChatRequest, Message
from loraplex.gateway.openai.completions import CompletionRequest
from loraplex.gateway.prompts import chat_requests, completion_requests

CALLER = Caller(tenant_id="t", tenant_name="t", key_id="k", role="inference")
ROUTE = Route(base=BASE, adapter=None)


def test_engine_not_ready_raises_before_its_tokenizer_is_asked(tmp_path: Path) -> None:
    engine = EchoEngine(settings_in(tmp_path))
    chat = ChatRequest(model=BASE, messages=[Message(role="user", content="x")])
    with pytest.raises(EngineUnavailable, match="starting"):
        chat_requests(chat, "c", ROUTE, CALLER, engine)
    with pytest.raises(EngineUnavailable, match="starting"):
        completion_requests(CompletionRequest(model=BASE, prompt="x"), "x", "c", ROUTE, CALLER, engine)
