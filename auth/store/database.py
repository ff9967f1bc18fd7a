"""Opens the database and brings its tables up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

_MIGRATIONS = Path(__file__).parent / "migrations"
# Two gateways that start together must not both migrate. The number is arbitrary and must never change.
_ALONE = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "SELECT pg_advisory_xact_lock(6013294718)"}


async def open_database(url: str) -> AsyncEngine:
    """Connect and migrate to the newest revision. SQLite runs with WAL and enforced foreign keys.

    The directory of an SQLite file is made, if need be. Raises SQLAlchemyError, OSError or ImportError.
    """
    engine = create_async_engine(url)
    if engine.dialect.name == "sqlite":
        database = engine.url.database or ""
        if database != ":memory:" and not database.startswith("file:"):
            Path(database).parent.mkdir(parents=True, exist_ok=True)
        event.listen(engine.sync_engine, "connect", _set_sqlite_pragmas)
    try:
        async with engine.begin() as connection:
            if (alone := _ALONE.get(engine.dialect.name)) is not None:
                await connection.execute(text(alone))
            await connection.run_sync(upgrade)
    except BaseException:
        await engine.dispose()
        raise
    return engine


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
