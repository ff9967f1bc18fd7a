"""What goes wrong at an upstream, and what it means here: by a script of answers, and by servers that are killed."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.command_line import ADMIN_KEY, free_port, serving_at
from support.gateway import write_adapter
from support.upstream import KEY_ENV, Script, in_front_of, say, scripted, stream, write_echo_base

from loraplex.engines.errors import (
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnsupported,
    DeadlineExceeded,
    EngineDied,
    EngineError,
    EngineOverloaded,
    EngineUnavailable,
    GenerationFailed,
    InvalidRequest,
    ModelNotServable,
    NoRoomBesidePins,
    PromptTooLong,
)
from loraplex.engines.protocol import Adapter, EmbedRequest, GenerateRequest, SamplingParams, TokenEvent
from loraplex.engines.upstream.engine import UpstreamEngine

SECRET = "a-secret-key-of-the-upstream"
COMPLETIONS, LOAD = "/v1/completions", "/v1/load_lora_adapter"
TOKEN = {"choices": [{"index": 0, "text": "a", "token_ids": [97]}]}
END = {"choices": [{"index": 0, "text": "", "token_ids": [256], "finish_reason": "stop"}]}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    monkeypatch.setenv(KEY_ENV, SECRET)
    with scripted() as script:
        yield script


@asynccontextmanager
async def started(url: str, home: Path, engine: dict[str, Any] | None = None, **upstream: Any) -> AsyncIterator[Any]:
    settings = in_front_of(url, home, write_echo_base(home / "base"), "base", engine, **upstream)
    made = UpstreamEngine(settings)
    try:
        await made.start(lambda progress: None)
        yield made
    finally:
        await made.close()


def wish(prompt: str = "x", seconds: float | None = None, adapter: Adapter | None = None, **sampling: Any) -> Any:
    params = SamplingParams(**{"max_tokens": 8, **sampling})
    return GenerateRequest(
        request_id=f"{prompt}-{time.monotonic_ns()}", prompt_token_ids=tuple(prompt.encode()), sampling=params,
        timeout_seconds=seconds, adapter=adapter,
    )  # fmt: skip


async def told(engine: UpstreamEngine, request: GenerateRequest) -> list[TokenEvent]:
    async with aclosing(engine.generate(request)) as events:
        return [event async for event in events]


def refused(status: int, message: str = "why", **more: Any) -> Any:
    return say(status, {"error": {"message": message, "type": "x", "code": status, **more}})


ANSWERS: dict[str, tuple[Any, type[EngineError], str]] = {
    "400": (refused(400, "no such thing", param="seed"), InvalidRequest, "^no such thing$"),
    "too long": (say(400, {"error": {"message": "long", "code": "context_length_exceeded"}}), PromptTooLong, "long"),
    "401": (refused(401), EngineUnavailable, "does not accept this gateway's key"),
    "404": (refused(404, "no model"), EngineUnavailable, "the upstream: no model"),
    "429": (refused(429, "busy"), EngineOverloaded, "the upstream: busy"),
    "503": (say(503, b"<html>", "text/html"), EngineOverloaded, "status 503"),
    "502": (say(502, b"<html>", "text/html"), EngineUnavailable, "status 502"),
    "500": (refused(500, f"at {SECRET}!"), GenerationFailed, r"^the upstream: at \*\*\*!$"),
    "its own kind": (say(503, {"error": {"message": "m", "code": "engine_unavailable"}}), EngineUnavailable, "m"),
    "no events": (say(200, b"hello", "text/plain"), EngineDied, "broke the answer off"),
    "garbage": (stream("{nonsense", "[DONE]"), GenerationFailed, "not in OpenAI's shape"),
    "another shape": (stream({"choices": 3}, "[DONE]"), GenerationFailed, "not in OpenAI's shape"),
    "no token ids": (stream({"choices": [{"text": "a"}]}, "[DONE]"), GenerationFailed, "tells no token ids"),
    "cut off": (stream(TOKEN), EngineDied, "broke the answer off"),
    "error amid": (stream(TOKEN, {"error": {"message": "m", "code": 500}}), GenerationFailed, "the upstream: m"),
    "died amid": (stream(TOKEN, {"error": {"message": "m", "code": "engine_died"}}), EngineDied, "m"),
    "given up": (stream({"choices": [{"token_ids": [], "finish_reason": "abort"}]}), EngineDied, "gave the request up"),
}


@pytest.mark.parametrize("case", ANSWERS)
async def test_answer_that_is_none_means_its_error(script: Script, tmp_path: Path, case: str) -> None:
    answer, error, words = ANSWERS[case]
    script.answers[COMPLETIONS] = answer
    async with started(script.url, tmp_path) as engine:
        with pytest.raises(error, match=words) as raised:
            await told(engine, wish())
        assert type(raised.value) is error or case == "404"
        if case == "400":
            assert isinstance(raised.value, InvalidRequest)
            assert raised.value.param == "seed"
        assert (await engine.stats()).total_failed == 1
        script.answers[COMPLETIONS] = stream(TOKEN, END, "[DONE]")
        assert "".join(event.text for event in await told(engine, wish())) == "a"


async def test_request_says_what_it_wants_and_nothing_else(script: Script, tmp_path: Path) -> None:
    script.answers[COMPLETIONS] = stream(TOKEN, END, "[DONE]")
    async with started(script.url, tmp_path, sends_priority=True) as engine:
        await told(engine, wish("hi"))
        _, headers, body = next(asked for asked in script.asked if asked[0] == COMPLETIONS)
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert body == {
        "model": "base", "prompt": [104, 105], "n": 1, "stream": True, "stream_options": {"include_usage": True},
        "return_token_ids": True, "max_tokens": 8, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "repetition_penalty": 1.0, "priority": 0,
    }  # fmt: skip


async def test_end_is_told_with_the_last_token_however_the_upstream_tells_it(script: Script, tmp_path: Path) -> None:
    """With that token, behind it, or with no token at all."""
    behind = {"choices": [{"token_ids": [256]}]}, {"choices": [{"text": "", "finish_reason": "stop"}]}
    usage = {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 3}}}
    async with started(script.url, tmp_path) as engine:
        for frames in ((TOKEN, END, usage), (TOKEN, *behind, usage)):
            script.answers[COMPLETIONS] = stream(*frames, "[DONE]")
            first, last = await told(engine, wish())
            assert (first.token_ids, first.text, first.finish_reason) == ((97,), "a", None)
            assert (last.token_ids, last.text, last.finish_reason, last.is_end) == ((256,), "", "stop", True)
            assert last.num_cached_tokens == 3
        script.answers[COMPLETIONS] = stream(TOKEN, behind[1], "[DONE]")
        _, last = await told(engine, wish())
        assert (last.token_ids, last.finish_reason, last.is_end) == ((), "stop", False)
        script.answers[COMPLETIONS] = stream(TOKEN, END)  # and then the connection is lost
        assert (await told(engine, wish()))[-1].finish_reason == "stop"


async def test_text_behind_a_stop_string_is_left_out_and_its_making_ended(script: Script, tmp_path: Path) -> None:
    frames = [{"choices": [{"token_ids": [byte]}]} for byte in b"abcdef"]
    script.answers[COMPLETIONS] = stream(*frames, then=lambda: time.sleep(0.5))
    async with started(script.url, tmp_path) as engine:
        began = time.monotonic()
        events = await told(engine, wish(stop=("cd",), max_tokens=100))
        assert time.monotonic() - began < 0.4
    assert "".join(event.text for event in events) == "ab"
    assert (events[-1].finish_reason, events[-1].stop_reason) == ("stop", "cd")
    assert [token for event in events for token in event.token_ids] == [97, 98, 99, 100]


@pytest.mark.parametrize(
    ("frames", "engine", "seconds", "error"),
    [
        ((), {}, 0.2, DeadlineExceeded),
        ((TOKEN,), {}, 0.2, DeadlineExceeded),
        ((), {"max_wait_seconds": 0.2}, None, EngineOverloaded),
        ((TOKEN,), {"unresponsive_seconds": 0.2}, None, EngineDied),
    ],
    ids=["deadline before", "deadline amid", "too long in coming", "silent amid"],
)
async def test_silence_ends_a_request(
    script: Script, tmp_path: Path, frames: Any, engine: Any, seconds: float | None, error: type[EngineError]
) -> None:
    script.answers[COMPLETIONS] = stream(*frames, then=lambda: time.sleep(1.0))
    async with started(script.url, tmp_path, engine) as made:
        with pytest.raises(error):
            await told(made, wish(seconds=seconds))
        assert (await made.stats()).num_running == (await made.stats()).num_waiting == 0


async def test_requests_beyond_those_that_may_wait_are_refused(script: Script, tmp_path: Path) -> None:
    script.answers[COMPLETIONS] = stream(then=lambda: time.sleep(0.3))
    async with started(script.url, tmp_path, {"max_waiting": 1}) as engine:
        first = asyncio.create_task(told(engine, wish()))
        while not (await engine.stats()).num_waiting:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineOverloaded, match="wait already"):
            await told(engine, wish())
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert (await engine.stats()).total_aborted == 1


ADAPTERS: dict[str, tuple[Any, type[EngineError], str]] = {
    "no route": (say(404, {"detail": "Not Found"}), AdapterUnsupported, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
    "no files": (refused(404, "none at /x"), AdapterNotFound, "the upstream: none at /x"),
    "refused": (refused(400, "bad"), AdapterInvalid, "the upstream: bad"),
    "vLLM's worker": (
        refused(
            500, "Call to add_lora method failed: Worker failed with error 'no DoRA.', please check the stack trace"
        ),
        AdapterUnsupported,
        "^the upstream: no DoRA.$",
    ),
    "busy": (refused(503, "busy"), EngineOverloaded, "busy"),
}


@pytest.mark.parametrize("case", ADAPTERS)
async def test_adapter_that_is_not_loaded_means_its_error(script: Script, tmp_path: Path, case: str) -> None:
    script.answers[LOAD], error, words = ADAPTERS[case]
    adapter = Adapter(id="sha-1", name="one", path=str(write_adapter(tmp_path / "one")))
    async with started(script.url, tmp_path) as engine:
        for ask in (told(engine, wish(adapter=adapter)), engine.load(adapter)):
            with pytest.raises(error, match=words):
                await ask
        assert await engine.residency() == []
        script.answers[LOAD] = say(200, b"Success", "text/plain")
        await engine.load(adapter)
        assert [one.adapter_id for one in await engine.residency()] == ["sha-1"]


async def test_adapter_is_named_by_the_path_that_the_upstream_has(script: Script, tmp_path: Path) -> None:
    script.answers[LOAD] = say(200, b"Success", "text/plain")
    write_adapter(tmp_path / "cache" / "sha-1")
    async with started(script.url, tmp_path, path_prefix=(str(tmp_path / "cache"), "/mnt/there")) as engine:
        await engine.load(Adapter(id="sha-1", name="one", path=str(tmp_path / "cache" / "sha-1")))
        await engine.load(Adapter(id="sha-2", name="two", path="/elsewhere/sha-2"))
    assert [body["lora_path"] for path, _, body in script.asked if path == LOAD] == [
        "/mnt/there/sha-1", "/elsewhere/sha-2"
    ]  # fmt: skip


async def test_pinned_adapters_leave_no_room(script: Script, tmp_path: Path) -> None:
    script.answers[LOAD] = say(200, b"Success", "text/plain")
    adapters = [Adapter(id=f"sha-{number}", name="x", path=str(tmp_path)) for number in range(2)]
    async with started(script.url, tmp_path, max_adapters=1) as engine:
        await engine.pin(adapters[0], pinned=True)
        with pytest.raises(NoRoomBesidePins, match="max_adapters"):
            await engine.load(adapters[1])
        await engine.pin(adapters[0], pinned=False)
        await engine.load(adapters[1])


async def test_embeddings_that_the_upstream_has_not_are_refused(script: Script, tmp_path: Path) -> None:
    async with started(script.url, tmp_path) as engine:
        assert engine.info().embedding_width == 0
        with pytest.raises(InvalidRequest, match="gives no embeddings"):
            await engine.embed(EmbedRequest(request_id="e", prompt_token_ids=(1,)))
    script.answers["/v1/embeddings"] = say(200, {"data": [{"embedding": [0.5, 0.25]}]})
    async with started(script.url, tmp_path) as engine:
        assert engine.info().embedding_width == 2
        found = await engine.embed(EmbedRequest(request_id="e", prompt_token_ids=(1,)))
        assert found.values == (0.5, 0.25)
        with pytest.raises(InvalidRequest, match="pools by 'mean' alone"):  # how, vLLM is told at its start
            await engine.embed(EmbedRequest(request_id="e", prompt_token_ids=(1,), pooling="last"))


async def test_reload_takes_up_what_the_upstream_serves_now(script: Script, tmp_path: Path) -> None:
    script.answers[COMPLETIONS] = stream(TOKEN, END, "[DONE]")
    async with started(script.url, tmp_path) as engine:
        assert engine.info().max_model_len == 512
        script.answers["/v1/models"] = say(200, {"data": [{"id": "other", "max_model_len": 64}]})
        assert (await engine.reload()).max_model_len == engine.info().max_model_len == 64
        await told(engine, wish())
        assert [body["model"] for path, _, body in script.asked if path == COMPLETIONS] == ["other"]


async def test_upstream_that_cannot_be_served_from_ends_the_start(script: Script, tmp_path: Path) -> None:
    for answer, words in (
        (refused(401), f"does not accept the key in {KEY_ENV}"),
        (say(200, {"data": []}), "serves no model"),
        (say(200, {"data": [{"id": "a"}]}), "set model.max_model_len"),
    ):
        script.answers["/v1/models"] = answer
        with pytest.raises(ModelNotServable, match=words):
            async with started(script.url, tmp_path):
                pass
    script.answers["/v1/models"] = say(200, {"data": [{"id": "a", "max_model_len": 8}]})
    with pytest.raises(ModelNotServable, match=r"upstream\.model = 'b': the upstream serves a"):
        async with started(script.url, tmp_path, model="b"):
            pass


async def test_key_is_in_no_log_and_no_error(script: Script, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    script.answers[COMPLETIONS] = refused(500, f"Bearer {SECRET}")
    script.answers["/health"] = refused(503, SECRET)
    async with asyncio.timeout(10):
        engine = UpstreamEngine(in_front_of(script.url, tmp_path, write_echo_base(tmp_path), "base"))
        starting = asyncio.create_task(engine.start(lambda progress: None))
        while not engine.health().detail:
            await asyncio.sleep(0.01)
        assert SECRET not in engine.health().detail
        script.answers["/health"] = say(200, b"", "text/plain")
        await starting
        with pytest.raises(GenerationFailed) as raised:
            await told(engine, wish())
        await engine.close()
    shown = [str(raised.value), *(record.getMessage() for record in caplog.records)]
    assert [text for text in shown if SECRET in text] == []
    assert any(json.dumps(SECRET)[1:-1] in str(headers) for _, headers, _ in script.asked)  # it was sent


async def test_upstream_killed_amid_a_stream_fails_it_and_serves_again_once_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, ADMIN_KEY)
    home, port = tmp_path / "there", free_port()
    home.mkdir()
    pinned = Adapter(id="a" * 64, name="pinned", path=str(write_adapter(tmp_path / "local" / "one")))

    extra = f'local_roots = ["{tmp_path}"]\n[files]\ndirectory = "{home / "files"}"'

    def loaded(client: Any) -> bool:
        return pinned.id in {model["id"] for model in client.get("/v1/models").json()["data"]}

    async with asyncio.timeout(60):
        with serving_at(home, port, extra) as (process, client):
            engine = UpstreamEngine(
                in_front_of(f"http://127.0.0.1:{port}", tmp_path, write_echo_base(tmp_path / "base"), "base")
            )
            await engine.start(lambda progress: None)
            await engine.pin(pinned, pinned=True)
            assert loaded(client)
            client.post("/v1/unload_lora_adapter", json={"lora_name": pinned.id}).raise_for_status()
            events = engine.generate(wish("<slow> " * 20, max_tokens=100))
            assert (await anext(events)).text == "<"
            process.kill()
            with pytest.raises(EngineDied):
                async for _ in events:
                    pass
        while engine.health().state == "ready":
            await asyncio.sleep(0.02)
        assert engine.health().state == "restarting"
        with pytest.raises(EngineUnavailable):
            await told(engine, wish())
        with serving_at(home, port, extra) as (_, client):
            while engine.health().state != "ready":
                await asyncio.sleep(0.02)
            assert "".join(event.text for event in await told(engine, wish("hi"))) == "hi"
            while not loaded(client):  # what is pinned is loaded again by itself
                await asyncio.sleep(0.02)
            assert (await engine.stats()).num_restarts == 1
            await engine.close()


async def test_request_that_is_left_is_left_by_the_upstream_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, ADMIN_KEY)
    port = free_port()
    (tmp_path / "there").mkdir()
    with serving_at(tmp_path / "there", port) as (_, client):

        async def num_running() -> int:
            answer = await asyncio.to_thread(client.get, "/admin/v1/engine/stats")
            return int(answer.json()["num_running"])

        async with asyncio.timeout(20), started(f"http://127.0.0.1:{port}", tmp_path) as engine:
            events = engine.generate(wish("<slow> " * 20, max_tokens=100))
            await anext(events)
            assert await num_running() == 1
            await events.aclose()
            while await num_running():
                await asyncio.sleep(0.02)
            stats = await engine.stats()
            assert (stats.num_running, stats.total_aborted) == (0, 1)
