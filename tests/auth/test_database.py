"""Opening a database: URLs without a driver, private files, and schemas of the future."""

from __future__ import annotations

import os
import socket
import stat
import sys
from pathlib import Path

import pytest
from sqlalchemy import text

from loraplex.auth.store import database
from loraplex.auth.store.database import SchemaTooNew, create_engine, open_database


async def test_url_that_names_no_driver_is_opened(url: str) -> None:
    plain = url.replace("+aiosqlite", "").replace("+asyncpg", "")
    assert plain != url
    engine = await open_database(plain)
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM tenants"))).scalar() == 0
    await engine.dispose()


async def test_schema_of_a_later_version_is_told(url: str) -> None:
    engine = await open_database(url)
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = 'r9999'"))
    await engine.dispose()
    with pytest.raises(SchemaTooNew, match="newer than this loraplex"):
        await open_database(url)


async def test_new_sqlite_file_is_its_owners_alone_and_one_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "new.db"
    before = os.umask(0o022)
    try:
        engine = await open_database(f"sqlite:///{path}")
        async with engine.begin() as connection:
            await connection.execute(text("DELETE FROM tenants"))
            found = sorted(path.parent.iterdir())
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in found}
        await engine.dispose()
        path.chmod(0o640)
        await (await open_database(f"sqlite:///{path}")).dispose()
    finally:
        os.umask(before)
    assert modes == {"new.db": 0o600, "new.db-shm": 0o600, "new.db-wal": 0o600}
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+asyncpg"])
def test_missing_driver_of_postgresql_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(ImportError, match=r"pip install 'loraplex\[postgres\]'"):
        create_engine(f"{scheme}://someone@localhost/loraplex")


async def test_server_that_accepts_and_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(TimeoutError):
            await open_database(f"postgresql://someone@127.0.0.1:{port}/loraplex")
