"""Chains of stored responses: read with one query, on either database, and for their tenant alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from support.services import own_postgres_database

from loraplex.auth.caller import Caller
from loraplex.auth.store.database import open_database
from loraplex.gateway.errors import PreviousResponseNotFound
from loraplex.gateway.openai import response_store
from loraplex.gateway.openai.response_store import ResponseStore, StoredResponse

ADMIN = Caller(tenant_id="", tenant_name="", key_id="admin", role="admin")


@pytest_asyncio.fixture(params=["sqlite", "postgresql"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    if request.param == "sqlite":
        opened = await open_database(f"sqlite+aiosqlite:///{tmp_path / 'responses.db'}")
        yield opened
        await opened.dispose()
        return
    async with own_postgres_database() as url:
        opened = await open_database(url)
        yield opened
        await opened.dispose()


async def test_conversation_is_read_with_one_query(database: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_store, "_LONGEST_CHAIN", 30)
    now, asked = [1000.0], []
    store = ResponseStore(database, 60.0, lambda: now[0])
    for number in range(31):
        said = [{"role": "user", "content": str(number)}]
        stored = StoredResponse(b'{"output":[{"type":"message","role":"assistant","content":"a"}]}', said)
        await store.save(ADMIN, str(number), stored, str(number - 1) if number else None)
        now[0] += 1

    event.listen(database.sync_engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    found = await store.conversation(ADMIN, "29")
    assert [item.content for item in found] == [text for number in range(30) for text in (str(number), "a")]
    assert len([query for query in asked if "responses" in query]) == 1
    other = Caller(tenant_id="t", tenant_name="t", key_id="t", role="inference")
    for caller, newest, missing in [(ADMIN, "30", "0"), (ADMIN, "x\0", "x\0"), (other, "29", "29")]:
        with pytest.raises(PreviousResponseNotFound) as caught:
            await store.conversation(caller, newest)
        assert repr(missing) in str(caught.value)
    now[0] = 1062.5  # the first three are gone
    with pytest.raises(PreviousResponseNotFound, match="'2'"):
        await store.conversation(ADMIN, "29")
