"""A store of adapters that tests steer, and who asks a catalogue over it."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec

from loraplex.auth.caller import Caller
from loraplex.engines.errors import (
    AdapterChanged,
    AdapterNotFound,
)
from loraplex.engines.protocol import Adapter
from loraplex.gateway.catalogue import Catalogue, Route
from loraplex.gateway.errors import AdapterNotReady

ADMIN = Caller(tenant_id="", tenant_name="", key_id="admin", role="admin")
ACME = Caller(tenant_id="t1", tenant_name="acme", key_id="k", role="inference")
OTHER = Caller(tenant_id="t2", tenant_name="other", key_id="k", role="inference")


class Fetched(msgspec.Struct, frozen=True):
    adapter: Adapter
    source: str
    revision: str = "1"
    num_bytes: int = 10


class Shelf:
    """A store whose source is a directory and whose identity of it is what `version` says; `gate` holds fetches up."""

    def __init__(self, version: str = "v1") -> None:
        self.version = version
        self.places: dict[str, Path] = {}
        self.num_fetches = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def address(self, uri: str) -> str:
        return uri

    async def drop_uploads(self, kept: Any, *, older_than_seconds: float = 0.0) -> None: ...

    def place(self, adapter_id: str) -> Path:
        return self.places.get(adapter_id, Path("/of/nothing"))

    def hold(self, adapter: Adapter) -> Any:
        return nullcontext(Path())

    def receive(self) -> Any:
        raise NotImplementedError

    async def merge(self, recipe: Any, name: str) -> Fetched:
        raise NotImplementedError

    async def fetch(
        self, uri: str, name: str, *, token: str | None = None, content: str = "", revision: str = ""
    ) -> Fetched:
        self.num_fetches += 1
        await asyncio.sleep(0)
        await self.gate.wait()
        if not Path(uri).is_dir():  # noqa: ASYNC240  a stat of a local disk
            raise AdapterNotFound("there is no such directory")
        if content not in ("", self.version):
            raise AdapterChanged("the source has other files by now")
        self.places[self.version] = Path(uri)
        return Fetched(Adapter(id=self.version, name=name, path=uri), uri, revision=self.version)


async def once_ready(catalogue: Catalogue, model: str) -> Route:
    async with asyncio.timeout(10):
        while True:
            try:
                return await catalogue.route(model, ACME)
            except AdapterNotReady:
                await asyncio.sleep(0.01)
