"""Opens the database and brings its tables up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, event, make_url, text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

_MIGRATIONS = Path(__file__).parent / "migrations"
# Drivers that work in an event loop, for URLs that name none.
_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
}
_CONNECT_SECONDS = 10.0
# Two gateways that start together must not both migrate. The number is arbitrary and must never change.
_ALONE = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "SELECT pg_advisory_xact_lock(6013294718)"}


class SchemaTooNew(Exception):
    """A later version of loraplex has changed the tables."""


async def open_database(url: str) -> AsyncEngine:
    """Connect and migrate to the newest revision. SQLite runs with WAL and enforced foreign keys.

    An SQLite file is made, if need be, and its directory; only its owner may read it. Raises SQLAlchemyError, OSError,
    ImportError, or SchemaTooNew.
    """
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        database = engine.url.database or ""
        if database not in ("", ":memory:") and not database.startswith("file:"):
            _make_file(Path(database))
        event.listen(engine.sync_engine, "connect", _set_sqlite_pragmas)
    try:
        async with engine.begin() as connection:
            if (alone := _ALONE.get(engine.dialect.name)) is not None:
                await connection.execute(text(alone))
            await connection.run_sync(upgrade)
    except BaseException as error:
        await engine.dispose()
        if isinstance(error, CommandError):  # it looks for the database's revision among ours
            raise SchemaTooNew("its schema is newer than this loraplex") from error
        raise
    return engine


def _make_file(path: Path) -> None:
    """Where there is none. SQLite gives its other files, beside it, the same mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.touch(mode=0o600)


def create_engine(url: str) -> AsyncEngine:
    """Not yet connected. Raises SQLAlchemyError where this is no database's URL, ImportError where its driver lacks."""
    parsed = make_url(url)
    if (kind := parsed.drivername.partition("+")[0]) not in _DRIVERS:
        raise ArgumentError(f"loraplex keeps its tables in sqlite or postgresql, not in {kind}")
    if (driver := _DRIVERS.get(parsed.drivername)) is not None:
        parsed = parsed.set(drivername=driver)
    # asyncpg would wait a minute for a server that accepts and does not answer
    arguments = {"timeout": _CONNECT_SECONDS} if parsed.drivername == "postgresql+asyncpg" else {}
    try:
        return create_async_engine(parsed, connect_args=arguments)
    except ModuleNotFoundError as error:
        if error.name != "asyncpg":
            raise
        raise ImportError("PostgreSQL's driver is not installed: pip install 'loraplex[postgres]'") from error


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Run the migrations up to a revision inside the connection's transaction."""
    command.upgrade(_config(connection), revision)


def downgrade(connection: Connection, revision: str) -> None:
    """Undo the migrations down to a revision."""
    command.downgrade(_config(connection), revision)


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _set_sqlite_pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA busy_timeout = 30000")  # ms; writers queue without order, and a busy machine is slow
    cursor.close()
