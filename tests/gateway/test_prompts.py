"""Prompts become requests, of an engine that can take them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.asking import asked_by
from support.gateway import BASE, settings_in

from loraplex.auth.caller import Caller
from loraplex.config.settings import Model
from loraplex.engines.echo import EchoEngine
from loraplex.engines.errors import EngineUnavailable, PromptTooLong
from loraplex.engines.protocol import SamplingDefaults
from loraplex.gateway.catalogue import Route
from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.openai.chat_messages import Message
from loraplex.gateway.openai.chat_wire import ChatRequest
from loraplex.gateway.openai.completions import CompletionRequest
from loraplex.gateway.openai.dialogue import LONG_TEXT, Dialogue
from loraplex.gateway.prompts import chat_requests, completion_requests, tokenizer_for

ASKED = asked_by(Caller(tenant_id="t", tenant_name="t", key_id="k", role="inference"))
MODEL = Model(path="", name=BASE)
ROUTE = Route(base=BASE, adapter=None)


async def test_engine_not_ready_raises_before_its_tokenizer_is_asked(tmp_path: Path) -> None:
    engine = EchoEngine(settings_in(tmp_path))
    with pytest.raises(EngineUnavailable, match="starting"):
        await tokenizer_for(ROUTE, engine)
    with pytest.raises(EngineUnavailable, match="starting"):
        await completion_requests(ASKED, CompletionRequest(model=BASE, prompt="x"), "x", "c", ROUTE, engine)


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
    await chat_requests(ASKED, Dialogue(chat, engine.tokenizer, MODEL), "c", ROUTE, engine)
    completion = CompletionRequest(model=BASE, prompt="x")
    await completion_requests(ASKED, completion, ["x" * length], "c", ROUTE, engine)
    assert [place is threading.current_thread() for place in places] == [is_in_loop] * 2


async def test_words_are_made_tokens_once_for_all_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EchoEngine(settings_in(tmp_path))
    await engine.start(lambda progress: None)
    encode, seen = engine.tokenizer.encode, []

    def noted(text: str, **named: Any) -> list[int]:
        seen.append(text)
        return encode(text, **named)

    monkeypatch.setattr(engine.tokenizer, "encode", noted)
    body = CompletionRequest(model=BASE, prompt="", n=3, seed=7, bad_words=["no", "never"], max_tokens=2)
    made = await completion_requests(ASKED, body, ["a", "bc"], "c", ROUTE, engine)
    assert sorted(seen) == [" never", " no", "a", "bc", "never", "no"]
    assert [one.sampling.seed for one in made] == [7, 8, 9] * 2
    assert all(one.sampling.bad_words_ids == made[0].sampling.bad_words_ids for one in made)
    assert len(made[0].sampling.bad_words_ids) == 4


async def test_answers_of_one_request_have_the_limits_of_their_prompts(tmp_path: Path) -> None:
    engine = EchoEngine(settings_in(tmp_path))
    await engine.start(lambda progress: None)
    body = CompletionRequest(model=BASE, prompt="", max_tokens=510, min_tokens=3)
    with pytest.raises(PromptTooLong):
        await completion_requests(ASKED, body, ["ab", "abc"], "c", ROUTE, engine)
    chat = ChatRequest(model=BASE, messages=[Message(role="user", content="x" * 510)], min_tokens=3)
    with pytest.raises(MalformedRequest, match="At most 2 tokens"):
        await chat_requests(ASKED, Dialogue(chat, engine.tokenizer, MODEL), "c", ROUTE, engine)


async def test_what_a_request_leaves_open_is_as_the_model_recommends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EchoEngine(settings_in(tmp_path))
    await engine.start(lambda progress: None)
    defaults = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, typical_p=0.8, repetition_penalty=1.2)
    info = msgspec.structs.replace(engine.info(), sampling_defaults=defaults)
    monkeypatch.setattr(engine, "info", lambda: info)

    async def sampled(**said: float) -> tuple[float, ...]:
        body = CompletionRequest(model=BASE, prompt="x", **said)  # type: ignore[arg-type]
        [made] = await completion_requests(ASKED, body, "x", "c", ROUTE, engine)
        one = made.sampling
        return (one.temperature, one.top_p, one.top_k, one.min_p, one.typical_p, one.repetition_penalty)

    assert await sampled() == (0.6, 0.9, 20, 0.1, 0.8, 1.2)
    assert await sampled(temperature=0, top_p=1.0, top_k=-1, min_p=0, typical_p=1, repetition_penalty=1) == (
        0, 1, 0, 0, 1, 1,
    )  # fmt: skip
