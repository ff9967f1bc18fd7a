"""Settings -> Engine: the only place where an engine's module is imported, and only the one that is asked for."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Protocol, cast

from loraplex.config.settings import Settings
from loraplex.engines.errors import ModelNotServable
from loraplex.engines.protocol import Engine


class EngineFactory(Protocol):
    """What an entry point of the group `loraplex.engines` must name: usually the engine's class."""

    def __call__(self, settings: Settings) -> Engine: ...


def build_engine(settings: Settings) -> Engine:
    """The engine that `settings.engine.kind` names, not yet started. Raises ModelNotServable if there is none."""
    found = {point.name: point for point in entry_points(group="loraplex.engines")}
    kind = settings.engine.kind
    if kind not in found:
        raise ModelNotServable(f"engine.kind = {kind!r}: no such engine is installed; there are {sorted(found)}")
    return cast(EngineFactory, found[kind].load())(settings)
