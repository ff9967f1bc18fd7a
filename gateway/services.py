"""Settings -> everything a server stands on, opened in order and closed in reverse."""

import logging
import re
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from redis.asyncio import Redis
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from loraplex.auth.audit import AuditLog
from loraplex.auth.errors import LimitsUnavailable
from loraplex.auth.keys import load_pepper
from loraplex.auth.ledger.ledger import Ledger, open_ledger
from loraplex.auth.ledger.retention import Retention
from loraplex.auth.ledger.usage import Usage
from loraplex.auth.limits.admission import Admission
from loraplex.auth.limits.memory import MemoryStore
from loraplex.auth.limits.policy import Limits
from loraplex.auth.limits.shared import RedisStore
from loraplex.auth.peppers import Peppers, fingerprints_in
from loraplex.auth.secrets import TenantSecrets
from loraplex.auth.store.changes import ACCESS, CATALOGUE, ChangeWatch
from loraplex.auth.store.database import SchemaTooNew, open_database
from loraplex.auth.tenants import Tenants
from loraplex.config.settings import LimitSettings, Settings, SettingsError, environment
from loraplex.engines.adapters.store import AdapterStore
from loraplex.engines.build import build_engine
from loraplex.engines.protocol import Engine
from loraplex.gateway.accounts import Accounts
from loraplex.gateway.arrivals import OtherBase, base_names
from loraplex.gateway.batches.records import BatchRecords
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.errors import CannotOpen
from loraplex.gateway.files.store import FileStore
from loraplex.gateway.openai.response_store import ResponseStore
from loraplex.gateway.pins import PinShares
from loraplex.gateway.source_tokens import SecretTokens

_log = logging.getLogger("loraplex.gateway")


class Services(msgspec.Struct, frozen=True):
    """What `create_app` needs. `new_admin_key` is set at the first start only, and known nowhere else."""

    engine: Engine
    store: AdapterStore
    tenants: Tenants
    catalogue: Catalogue
    accounts: Accounts
    secrets: TenantSecrets
    audit: AuditLog
    usage: Usage
    files: FileStore
    batches: BatchRecords
    responses: ResponseStore
    new_admin_key: str | None


@asynccontextmanager
async def open_services(settings: Settings, engine: Engine | None = None) -> AsyncIterator[Services]:
    """An engine that is not given is built, not started. Raises CannotOpen; ModelNotServable for an unknown engine."""
    engine = engine or build_engine(settings)
    try:
        pepper = load_pepper(environment(settings.auth.pepper_env), Path(settings.auth.pepper_file))
    except (OSError, ValueError) as error:
        raise CannotOpen(f"auth.pepper_file: {error}") from error
    database = await _database(settings.database.url)
    try:
        store = AdapterStore(settings.adapters)
    except (OSError, SettingsError) as error:
        await database.dispose()
        raise CannotOpen(str(error)) from error
    try:
        await _require_pepper_of(database, Peppers(pepper))
        tenants = Tenants(database, pepper, defaults=_default_limits(settings.limits))
        secrets, audit = TenantSecrets(database, pepper), AuditLog(database)
        files = FileStore(database, settings.files)
        batches = BatchRecords(database, files)
        async with (
            _books(settings, database) as ledger,
            _admission(settings.limits, ledger) as admission,
            ChangeWatch(database) as watch,
            _catalogue(settings, database, store, engine, secrets) as catalogue,
        ):
            accounts, usage = Accounts(admission, ledger, tenants), Usage(database, ledger.flush)
            watch.on(ACCESS, tenants.forget)
            watch.on(CATALOGUE, catalogue.reload, rests=True)  # it reads the whole catalogue
            responses = ResponseStore(database, settings.responses.retention_days * 86400.0)
            # last, for a key that was made is shown only by a start that comes so far
            made = await tenants.bootstrap_admin(environment(settings.auth.admin_key_env))
            yield Services(
                engine, store, tenants, catalogue, accounts, secrets, audit, usage, files, batches, responses, made
            )
    finally:
        await store.close()
        await database.dispose()


async def _database(url: str) -> AsyncEngine:
    """Raises CannotOpen."""
    try:
        return await open_database(url)
    except (SQLAlchemyError, OSError, ImportError, SchemaTooNew) as error:
        reason = getattr(error, "orig", None) or error
        raise CannotOpen(f"database.url: {str(reason) or type(reason).__name__}") from error


async def _require_pepper_of(database: AsyncEngine, peppers: Peppers) -> None:
    """Raises CannotOpen where no key could be let in and no secret read."""
    found = await fingerprints_in(database, time.time())
    if found and not found & peppers.fingerprints:
        raise CannotOpen(
            "auth.pepper_file: the database's keys are under another pepper; bring back the one that they were made "
            "under (gateways that share a database share it)"
        )


@asynccontextmanager
async def _books(settings: Settings, database: AsyncEngine) -> AsyncIterator[Ledger]:
    """The ledger, and whatever keeps it short. Raises CannotOpen."""
    try:
        ledger = await open_ledger(database, journal_dir(settings))
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise CannotOpen(f"usage.journal_dir: {error}") from error
    days = settings.usage.retention_days
    retention = None if days is None else Retention(database, days)
    try:
        yield ledger
    finally:
        if retention is not None:
            await retention.close()
        await ledger.close()


def journal_dir(settings: Settings) -> Path:
    """Each database has one of its own, so that nothing is settled in another's books."""
    url = make_url(settings.database.url)
    if settings.usage.journal_dir is not None:
        directory = settings.usage.journal_dir
    elif url.get_backend_name() == "sqlite":
        return Path(f"{url.database}.journal")
    else:  # on the local disk that uploaded adapters are kept on
        parts = "_".join(str(part) for part in (url.host, url.port, url.database) if part)
        name = re.sub(r"[^\w.-]", "_", parts)
        directory = f"{settings.adapters.cache_dir}-journal/{name}"
    return Path(directory).expanduser()


@asynccontextmanager
async def _admission(settings: LimitSettings, books: Ledger) -> AsyncIterator[Admission]:
    """In this process, or shared through Redis. Raises CannotOpen."""
    if settings.redis_url is None:
        admission = Admission(MemoryStore(books))
    else:
        try:
            redis = Redis.from_url(settings.redis_url, socket_timeout=1.0, socket_connect_timeout=1.0)
        except ValueError as error:
            raise CannotOpen(f"limits.redis_url: {error}") from error
        fallback = (lambda: MemoryStore(books)) if settings.on_redis_loss == "open" else None
        admission = Admission(RedisStore(redis, books), fallback)
    try:
        try:
            await admission.correct(books.recovered)
        except LimitsUnavailable as error:
            _log.error("budgets do not count yet all that killed gateways used: %s", error)
        yield admission
    finally:
        await admission.close()


def _catalogue(
    settings: Settings, database: AsyncEngine, store: AdapterStore, engine: Engine, secrets: TenantSecrets
) -> Catalogue:
    names = base_names(settings.model.name, settings.model.path, *settings.adapters.base_names)
    return Catalogue(
        database,
        store,
        engine,
        settings.model.name,
        tokens=SecretTokens(secrets),
        other_base=OtherBase(names, settings.adapters.on_other_base),
        preload=settings.adapters.preload,
        pin_shares=PinShares(settings.adapters.pinned_share, settings.adapters.tenant_pinned_share),
    )


def _default_limits(settings: LimitSettings) -> Limits:
    """What holds for a tenant without limits of its own."""
    return Limits(**{name: getattr(settings, name) for name in Limits.__struct_fields__ if hasattr(settings, name)})
