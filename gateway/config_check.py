"""What is wrong with a settings file, as far as that shows without loading the model or reaching anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from redis.asyncio import Redis
from sqlalchemy.exc import SQLAlchemyError

from loraplex.auth.store.database import create_engine
from loraplex.config.settings import Settings, SettingsError, require_long_admin_key
from loraplex.engines.adapters.sources.https import HttpsSource
from loraplex.engines.build import build_engine
from loraplex.engines.context_length import context_length, stated_positions
from loraplex.engines.errors import ModelNotServable
from loraplex.engines.tokenizer import require_tokenizer


def faults(settings: Settings) -> Iterator[str]:
    """Each with the setting that is to blame."""
    for check in (_engine, _model, _database, _redis, _certificates, _admin_key):
        try:
            check(settings)
        except (ModelNotServable, SettingsError) as error:
            yield str(error)


def _engine(settings: Settings) -> None:
    build_engine(settings)


def _model(settings: Settings) -> None:
    if settings.engine.kind not in ("native", "upstream"):
        return
    directory = settings.model.directory
    if not (directory / "config.json").is_file():
        raise SettingsError(f"model.path = {settings.model.path!r} holds no config.json")
    if not settings.model.random_weights:
        require_tokenizer(directory)
    if (num_positions := stated_positions(directory)) is not None:
        context_length(settings.model.max_model_len, num_positions)


def _database(settings: Settings) -> None:
    _try("database.url", lambda: create_engine(settings.database.url), SQLAlchemyError, ImportError)


def _redis(settings: Settings) -> None:
    url = settings.limits.redis_url
    if url is not None:
        _try("limits.redis_url", lambda: Redis.from_url(url), ValueError)


def _certificates(settings: Settings) -> None:
    HttpsSource(settings.adapters.https_ca_file, allow_private=False)


def _admin_key(settings: Settings) -> None:
    require_long_admin_key(settings.auth)


def _try(setting: str, use: Callable[[], object], *errors: type[Exception]) -> None:
    """Raises SettingsError."""
    try:
        use()
    except errors as error:
        raise SettingsError(f"{setting}: {error}") from error
