"""A gateway over the echo engine behind a real uvicorn server, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from loraplex.config.settings import (
    Adapters,
    Auth,
    BatchSettings,
    Database,
    EngineSettings,
    FileSettings,
    Model,
    Server,
    Settings,
)
from loraplex.gateway.launch import listen
from loraplex.gateway.server import serve
from loraplex.gateway.services import Services, open_services

BASE = "echo-base"


@dataclass
class Gateway:
    """A running server: where it is, keys to it, and its insides."""

    url: str
    admin_key: str
    services: Services
    loop: asyncio.AbstractEventLoop
    tenant_id: str = ""
    api_key: str = ""
    adapter_dir: Path = field(default_factory=Path)

    def client(self, key: str | None = None) -> httpx.Client:
        """A plain HTTP client with the tenant's key, or another."""
        headers = {"Authorization": f"Bearer {key or self.api_key}"}
        # no TLS here, and reading the machine's certificates would take most of a test's time
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, verify=False)

    def admin(self) -> httpx.Client:
        return self.client(self.admin_key)

    def new_tenant(self, name: str) -> tuple[str, str]:
        """(tenant id, key)"""
        with self.admin() as admin:
            tenant = admin.post("/admin/v1/tenants", json={"name": name}).json()["id"]
            return tenant, admin.post(f"/admin/v1/tenants/{tenant}/keys", json={}).json()["key"]

    def stats(self) -> Any:
        return asyncio.run_coroutine_threadsafe(self.services.engine.stats(), self.loop).result(10)


def wait_running(gateway: Gateway) -> None:
    """Until its engine answers something."""
    deadline = time.monotonic() + 10
    while not gateway.stats().num_running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def write_adapter(directory: Path, rank: int = 4) -> Path:
    """A directory that the store accepts and the echo engine reads: a config and a small safetensors file."""
    directory.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    data = bytes([rank]) * 4
    name = "base_model.model.q.lora_A.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (directory / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    return directory


def settings_in(home: Path, **server: Any) -> Settings:
    options: dict[str, Any] = {"port": 0, "drain_seconds": 2, **server}
    return Settings(
        model=Model(path=str(home), name=BASE, max_model_len=512),
        server=Server(**options),
        engine=EngineSettings(kind="echo"),
        adapters=Adapters(cache_dir=str(home / "cache"), local_roots=(str(home / "local"),)),
        database=Database(url=f"sqlite+aiosqlite:///{home / 'loraplex.db'}"),
        files=FileSettings(directory=str(home / "files"), max_file_bytes=2**20, max_tenant_bytes=3 * 2**20),
        batches=BatchSettings(lease_seconds=1.0),
        auth=Auth(pepper_file=str(home / "pepper"), admin_key_env="LORAPLEX_TEST_ADMIN_KEY"),
    )


@contextmanager
def running(settings: Settings, admin_key: str, *, send_buffer: int | None = None) -> Iterator[Gateway]:
    """Serve until the block ends, as the CLI does. `LORAPLEX_TEST_ADMIN_KEY` must hold `admin_key`.

    `send_buffer` is what the kernel keeps for a client that does not read, in bytes.
    """
    started = threading.Event()
    found: list[Gateway] = []
    stop: list[asyncio.Task[None]] = []
    errors: list[BaseException] = []

    async def main() -> None:
        listener = listen(settings)
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        host, port = listener.getsockname()[:2]
        with listener:
            async with open_services(settings) as services:

                async def on_ready() -> None:
                    found.append(Gateway(f"http://{host}:{port}", admin_key, services, asyncio.get_running_loop()))
                    started.set()

                stop.append(
                    asyncio.ensure_future(
                        serve(settings, services, listener, services.engine.start(lambda _: None), on_ready)
                    )
                )
                with suppress(asyncio.CancelledError):
                    await stop[0]

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001  told to the test below
            errors.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait(30)
    try:
        assert not errors, errors
        yield found[0]
    finally:
        assert found, errors
        found[0].loop.call_soon_threadsafe(stop[0].cancel)
        thread.join(20)
        assert not thread.is_alive()
