"""Gateways in processes of their own, over an engine that keeps its own count, on stores they may share."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import httpx
from support.services import REDIS, own_postgres_database, own_redis
from support.witness import install, run_gateway

ADMIN_KEY = "an-admin-key-of-the-tests"
GIVE_UP_SECONDS = 240.0  # a bound against hanging; a gateway starts in two seconds on a machine of its own
# gateways are forked off a process that has imported everything: what takes long of a start is not what is looked at
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["support.witness"])
# what gateways are forked off is started by the first of them, and imports by its environment's path
IMPORT_PATH = ("PYTHONPATH", os.pathsep.join(sys.path))


@dataclass(frozen=True)
class Stores:
    """Where the gateways of one test keep what they know."""

    home: Path
    environment: dict[str, str]
    database_url: str
    redis_url: str | None = None


class Machine:
    """A gateway process, started again whenever it was killed."""

    def __init__(self, stores: Stores) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        home = stores.home
        self.url = f"http://127.0.0.1:{self.port}"
        self.is_up = asyncio.Event()
        self.num_kills = 0
        self._environment = stores.environment
        self._log = home / f"{self.port}.log"
        self._config = home / f"{self.port}.toml"
        self._config.write_text(
            f"""
[model]
path = "{home}"
name = "base"
max_model_len = 512
[server]
port = {self.port}
[engine]
kind = "witness"
[database]
url = "{stores.database_url}"
[usage]
journal_dir = "{home / "journal"}"
[auth]
pepper_file = "{home / "pepper"}"
[adapters]
cache_dir = "{home / "cache"}"
"""
            + (f'[limits]\nredis_url = "{stores.redis_url}"\n' if stores.redis_url else "")
        )
        self._process: ForkServerProcess | None = None

    def spawn(self) -> None:
        self._process = _processes.Process(target=run_gateway, args=(self._config, self._environment, self._log))
        self._process.start()

    async def start(self) -> None:
        self.spawn()
        deadline = time.monotonic() + GIVE_UP_SECONDS
        async with httpx.AsyncClient(base_url=self.url) as client:
            while True:
                try:
                    if (await client.get("/health")).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                assert self._process is not None
                assert self._process.is_alive(), self._log.read_text()[-2000:]
                assert time.monotonic() < deadline, self._log.read_text()[-2000:]
                await asyncio.sleep(0.02)
        self.is_up.set()

    def kill(self) -> None:
        assert self._process is not None
        self.is_up.clear()
        self._process.kill()
        self._process.join()
        assert self._process.exitcode == -signal.SIGKILL
        self.num_kills += 1

    def stop(self) -> int | None:
        """Its exit status after SIGTERM."""
        assert self._process is not None
        self._process.terminate()
        self._process.join(GIVE_UP_SECONDS)
        return self._process.exitcode

    def close(self) -> None:
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join()


class Tenant:
    def __init__(self, id: str, keys: list[str]) -> None:
        self.id = id
        self.keys = keys

    @classmethod
    async def make(cls, admin: httpx.AsyncClient, name: str, num_keys: int, **limits: int) -> Tenant:
        made = await admin.post("/admin/v1/tenants", json={"name": name, "limits": limits})
        tenant_id = made.json()["id"]
        path = f"/admin/v1/tenants/{tenant_id}/keys"
        return cls(tenant_id, [(await admin.post(path, json={})).json()["key"] for _ in range(num_keys)])


@asynccontextmanager
async def running(stores: Stores, count: int) -> AsyncIterator[list[Machine]]:
    machines = [Machine(stores) for _ in range(count)]
    try:
        await asyncio.gather(*(machine.start() for machine in machines))
        yield machines
    finally:
        for machine in machines:
            machine.close()


@asynccontextmanager
async def shared_stores(home: Path) -> AsyncIterator[Stores]:
    """PostgreSQL and Redis."""
    redis = await own_redis()
    await redis.aclose()
    async with own_postgres_database() as url:
        yield Stores(home, environment_in(home), url, REDIS)


def environment_in(home: Path) -> dict[str, str]:
    return {**install(home), "LORAPLEX_ADMIN_KEY": ADMIN_KEY}


def admin_of(machine: Machine) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    return httpx.AsyncClient(base_url=machine.url, headers=headers, timeout=GIVE_UP_SECONDS)
