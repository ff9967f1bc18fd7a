"""Start and stop: what is answered while the engine loads, and how a server ends that could not start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio
from support.gateway import BASE, settings_in
from support.problems import assert_problem

from loraplex.config.settings import Database, Settings, UsageSettings
from loraplex.engines.echo import EchoEngine
from loraplex.engines.errors import ModelNotServable
from loraplex.engines.protocol import EngineInfo, Progress
from loraplex.gateway.launch import listen
from loraplex.gateway.server import serve
from loraplex.gateway.services import Services, journal_dir, open_services


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
    return settings_in(tmp_path)


@pytest_asyncio.fixture
async def services(settings: Settings) -> AsyncIterator[Services]:
    async with open_services(settings) as services:
        yield services


async def no_news() -> None: ...


async def test_health_and_chat_say_starting_until_the_engine_is_ready(
    settings: Settings, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, ready = asyncio.Event(), asyncio.Event()
    start, info = EchoEngine.start, EchoEngine.info

    def info_once_loaded(self: EchoEngine) -> EngineInfo:
        assert loaded.is_set(), "an engine knows nothing of itself before it has started"
        return info(self)

    async def slow_start(self: EchoEngine, on_progress: Callable[[Progress], None]) -> EngineInfo:
        await loaded.wait()
        return await start(self, on_progress)

    async def on_ready() -> None:
        ready.set()

    monkeypatch.setattr(EchoEngine, "start", slow_start)
    monkeypatch.setattr(EchoEngine, "info", info_once_loaded)
    tokenizer = services.engine.tokenizer
    monkeypatch.setattr(services.engine, "tokenizer", None)
    progress: list[Progress] = []
    with listen(settings) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        serving = asyncio.create_task(
            serve(settings, services, listener, services.engine.start(progress.append), on_ready)
        )
        async with httpx.AsyncClient(base_url=url, headers={"authorization": "Bearer k"}) as client:
            body: Any = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
            for path in ("/health", "/ping"):
                health = await client.get(path)
                assert (health.status_code, health.json()["state"]) == (503, "starting")
            assert_problem(await client.post("/v1/chat/completions", json=body), 503, "engine_unavailable")
            prompt: Any = {"model": BASE, "prompt": "x"}
            assert_problem(await client.post("/v1/completions", json=prompt), 503, "engine_unavailable")
            assert_problem(await client.get("/admin/v1/engine"), 503, "engine_unavailable")
            assert (await client.get("/v1/models")).status_code == 200
            assert progress == []
            monkeypatch.setattr(services.engine, "tokenizer", tokenizer)
            loaded.set()
            await asyncio.wait_for(ready.wait(), 5)
            assert (await client.get("/health")).json()["state"] == "ready"
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
            assert [step.fraction for step in progress] == [1.0]
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


@pytest.mark.parametrize("where", ["start", "on_ready"])
async def test_serve_raises_what_kept_it_from_starting(
    settings: Settings, services: Services, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    async def fail(*_: object) -> Any:
        raise ModelNotServable("there is no such model")

    closed: list[float] = []

    async def close(drain_seconds: float = 0.0) -> None:
        closed.append(drain_seconds)

    monkeypatch.setattr(services.engine, "close", close)
    if where == "start":
        monkeypatch.setattr(services.engine, "start", fail)
    with listen(settings) as listener:
        serving = serve(
            settings,
            services,
            listener,
            services.engine.start(lambda _: None),
            fail if where == "on_ready" else no_news,
        )
        with pytest.raises(ModelNotServable, match="no such model"):
            await asyncio.wait_for(serving, 10)
    assert closed == [0.0]


async def test_serve_cancelled_while_it_starts_closes_the_engine(
    settings: Settings, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def endless(*_: object) -> Any:
        begun.set()
        await asyncio.sleep(3600)

    monkeypatch.setattr(services.engine, "start", endless)
    with listen(settings) as listener:
        serving = asyncio.create_task(
            serve(settings, services, listener, services.engine.start(lambda _: None), no_news)
        )
        await asyncio.wait_for(begun.wait(), 5)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(serving, 10)
    assert services.engine.health().state == "draining"


@pytest.mark.parametrize(
    ("url", "journal", "directory"),
    [
        ("sqlite+aiosqlite:////data/l.db", None, "/data/l.db.journal"),
        ("postgresql+asyncpg://u:hush@db.internal:5432/l", None, "/cache/adapters-journal/db.internal_5432_l"),
        ("postgresql+asyncpg://u@/../l?host=/run/pg", None, "/cache/adapters-journal/.._l"),
        ("postgresql+asyncpg://u@h/l", "/journal", "/journal"),
    ],
)
def test_journal_lies_where_the_settings_say(settings: Settings, url: str, journal: str | None, directory: str) -> None:
    adapters = msgspec.structs.replace(settings.adapters, cache_dir="/cache/adapters")
    usage = UsageSettings(journal_dir=journal)
    settings = msgspec.structs.replace(settings, database=Database(url=url), adapters=adapters, usage=usage)
    assert journal_dir(settings) == Path(directory)
