"""What a server stands on, opened or refused with the setting that is to blame."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from msgspec.structs import replace
from sqlalchemy import text
from support.gateway import settings_in

from loraplex.auth.store import database
from loraplex.auth.store.database import open_database
from loraplex.config.settings import Database, LimitSettings, Settings, UsageSettings
from loraplex.gateway.errors import CannotOpen
from loraplex.gateway.services import open_services


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("LORAPLEX_TEST_ADMIN_KEY", raising=False)
    return settings_in(tmp_path)


@pytest.mark.parametrize("broken", ["usage.journal_dir", "limits.redis_url"])
async def test_first_start_that_fails_leaves_the_admin_key_to_the_next(
    settings: Settings, tmp_path: Path, broken: str
) -> None:
    (tmp_path / "file").touch()
    wrong = {
        "usage.journal_dir": replace(settings, usage=UsageSettings(journal_dir=str(tmp_path / "file" / "journal"))),
        "limits.redis_url": replace(settings, limits=LimitSettings(redis_url="nonsense")),
    }[broken]
    with pytest.raises(CannotOpen, match=broken):
        async with open_services(wrong):
            pass
    async with open_services(settings) as services:
        assert services.new_admin_key is not None
        assert (await services.tenants.authenticate(services.new_admin_key)).role == "admin"


async def test_keys_under_another_pepper_are_told_at_the_start(settings: Settings, tmp_path: Path) -> None:
    pepper = tmp_path / "pepper"
    async with open_services(settings) as services:
        tenant = await services.tenants.create_tenant("acme")
        key = (await services.tenants.create_key(tenant.id, "one")).key
    first = pepper.read_text()
    for other in (None, "another", "another\nand a third"):
        pepper.unlink()
        if other is not None:
            pepper.write_text(other)
        with pytest.raises(CannotOpen, match=r"auth\.pepper_file: the database's keys are under another pepper"):
            async with open_services(settings):
                pass
    pepper.write_text(f"{first}\nsecond")  # a rotation: keys move to the newer one as they are used
    async with open_services(settings) as services:
        assert (await services.tenants.authenticate(key)).tenant_id == tenant.id
    pepper.write_text("second")
    async with open_services(settings) as services:
        assert (await services.tenants.authenticate(key)).tenant_id == tenant.id


async def test_pepper_of_a_database_without_keys_may_be_any(settings: Settings, tmp_path: Path) -> None:
    for pepper in ("one", "two"):
        (tmp_path / "pepper").write_text(pepper)
        async with open_services(settings):
            pass


async def test_pepper_file_may_lie_in_the_home_directory(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    async with open_services(replace(settings, auth=replace(settings.auth, pepper_file="~/pepper"))):
        assert (tmp_path / "home" / "pepper").is_file()
    assert not (tmp_path / "~").exists()


async def test_schema_of_a_later_version_is_told_as_the_databases(settings: Settings) -> None:
    engine = await open_database(settings.database.url)
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = 'r9999'"))
    await engine.dispose()
    with pytest.raises(CannotOpen, match=r"database\.url: its schema is newer than this loraplex"):
        async with open_services(settings):
            pass


async def test_database_that_accepts_and_does_not_answer_is_told(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"postgresql+asyncpg://someone@127.0.0.1:{listener.getsockname()[1]}/loraplex"
        with pytest.raises(CannotOpen, match=r"database\.url: TimeoutError"):
            async with open_services(replace(settings, database=Database(url=url))):
                pass
