"""Settings -> everything a server stands on, opened in order and closed in reverse."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from loraplex.auth.keys import load_pepper
from loraplex.auth.store.database import open_database
from loraplex.auth.tenants import Tenants
from loraplex.config.settings import Settings, environment
from loraplex.engines.adapters.store import AdapterStore
from loraplex.engines.build import build_engine
from loraplex.engines.protocol import Engine
from loraplex.gateway.catalogue import Catalogue


class CannotOpen(Exception):
    """Something that the settings name cannot be used; the message says which setting, and why."""


class Services(msgspec.Struct, frozen=True):
    """What `create_app` needs. `new_admin_key` is set at the first start only, and known nowhere else."""

    engine: Engine
    tenants: Tenants
    catalogue: Catalogue
    new_admin_key: str | None


@asynccontextmanager
async def open_services(settings: Settings) -> AsyncIterator[Services]:
    """The engine is built, not started. Raises ModelNotServable for an unknown kind of engine, or CannotOpen."""
    engine = build_engine(settings)
    try:
        pepper = load_pepper(environment(settings.auth.pepper_env), Path(settings.auth.pepper_file))
    except (OSError, ValueError) as error:
        raise CannotOpen(f"auth.pepper_file: {error}") from error
    try:
        database = await open_database(settings.database.url)
    except (SQLAlchemyError, OSError, ImportError) as error:
        raise CannotOpen(f"database.url: {getattr(error, 'orig', None) or error}") from error
    store = AdapterStore(settings.adapters)
    try:
        tenants = Tenants(database, pepper)
        made = await tenants.bootstrap_admin(environment(settings.auth.admin_key_env))
        catalogue = Catalogue(database, store, engine, settings.model.name)
        await catalogue.reload()
        yield Services(engine, tenants, catalogue, made)
    finally:
        await store.close()
        await database.dispose()
