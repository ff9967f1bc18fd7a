"""A gateway's catalogue at work until it is killed: registers, uploads, updates, evicts and deletes, and says so.

`python catalogue_worker.py HOME` reads lines `SEED SECONDS`: for each it forks a worker, kills it so long after its
first operation, and writes how it ended, as an exit code; -9 is the kill. Each line of the worker's log is written
before (`begin NAME`) or after (`has NAME CONTENT`, `gone NAME`) an operation, with one write, so that it is there
whatever happens to the process.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from support.adapter_files import adapter_files
from support.gateway import BASE, settings_in

from loraplex.auth.caller import Caller
from loraplex.auth.store.database import open_database
from loraplex.config.settings import Settings
from loraplex.engines.adapters.store import AdapterStore
from loraplex.engines.echo import EchoEngine
from loraplex.gateway.catalogue import Catalogue

NUM_NAMES = 8
SIZE = 2048  # 66 kB an adapter
DISK_BYTES = 800_000  # room for those of every name that arrive at once, and not for all that were uploaded
CALLER = Caller(tenant_id="", tenant_name="", key_id="admin", role="admin")


def settings_of(home: Path) -> Settings:
    settings = settings_in(home)
    adapters = msgspec.structs.replace(settings.adapters, disk_bytes=DISK_BYTES)
    return msgspec.structs.replace(settings, adapters=adapters)


@asynccontextmanager
async def catalogue_in(home: Path) -> AsyncIterator[tuple[Catalogue, AdapterStore]]:
    """As a server opens it."""
    settings = settings_of(home)
    database = await open_database(settings.database.url)
    store = AdapterStore(settings.adapters)
    engine = EchoEngine(settings)
    await engine.start(lambda progress: None)
    try:
        async with Catalogue(database, store, engine, BASE) as catalogue:
            yield catalogue, store
    finally:
        await store.close()
        await database.dispose()


def main() -> None:
    home = Path(sys.argv[1])
    for line in sys.stdin:
        seed, seconds = line.split()
        print(_life(home, int(seed), float(seconds)), flush=True)


def _life(home: Path, seed: int, seconds: float) -> int:
    begun = _log_bytes(home)
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(_work(home, random.Random(seed)))
        except BaseException:  # noqa: BLE001  a fork ends here, whatever happened
            traceback.print_exc()
        os._exit(1)
    killed_at = time.monotonic() + 60  # unless it begins
    while time.monotonic() < killed_at:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if begun is not None and _log_bytes(home) != begun:
            begun, killed_at = None, time.monotonic() + seconds
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _log_bytes(home: Path) -> int | None:
    return (home / "log").stat().st_size if (home / "log").exists() else 0


async def _work(home: Path, chance: random.Random) -> None:
    """Never returns."""
    log = os.open(home / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    async with catalogue_in(home) as (catalogue, store):
        while True:
            key = "", f"n{chance.randrange(NUM_NAMES)}"
            os.write(log, f"begin {key[1]}\n".encode())
            await _do_something(catalogue, store, key[1], chance, home)
            if not catalogue.has(key):
                os.write(log, f"gone {key[1]}\n".encode())
                continue
            entry = catalogue.get(*key)
            version = entry.version(entry.current_version)
            os.write(log, f"has {key[1]} {version.adapter_id if version is not None else '-'}\n".encode())


async def _do_something(
    catalogue: Catalogue, store: AdapterStore, name: str, chance: random.Random, home: Path
) -> None:
    key, kind = ("", name), chance.random()
    if not catalogue.has(key):
        await _enter(catalogue, store, name, chance, home)
    elif kind < 0.25:
        await catalogue.remove(*key, drains=True)
    elif kind < 0.5:
        await catalogue.update(key, _source(home, chance))
    elif kind < 0.6:
        await catalogue.evict(key)
    elif catalogue.get(*key).current_version is not None:
        await catalogue.route(name, CALLER)


async def _enter(catalogue: Catalogue, store: AdapterStore, name: str, chance: random.Random, home: Path) -> None:
    if chance.random() < 0.5:
        await catalogue.register(name, _source(home, chance), waits=chance.random() < 0.7)
        return
    with store.receive() as upload:
        for file, content in adapter_files(chance.randrange(10, 1000), size=SIZE).items():
            upload.open(file)
            await asyncio.to_thread(upload.write, content)
        await catalogue.register(name, await asyncio.to_thread(upload.keep))


def _source(home: Path, chance: random.Random) -> str:
    return str(home / "local" / str(chance.randrange(NUM_NAMES)))


if __name__ == "__main__":
    main()
