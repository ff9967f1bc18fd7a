"""`loraplex serve` over the echo engine, as a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

LORAPLEX = str(Path(sys.executable).parent / "loraplex")
ADMIN_KEY = "an-admin-key-of-the-tests"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def write_config(home: Path, port: int = 0, extra: str = "", drain_seconds: int = 10) -> Path:
    path = home / "loraplex.toml"
    path.write_text(
        f"""
[model]
path = "{home}"
name = "echo-base"
[server]
port = {port}
drain_seconds = {drain_seconds}
[engine]
kind = "echo"
[database]
url = "sqlite+aiosqlite:///{home / "test.db"}"
[auth]
pepper_file = "{home / "pepper"}"
[adapters]
cache_dir = "{home / "cache"}"
{"" if "[files]" in extra else f'[files]{chr(10)}directory = "{home / "files"}"'}
{extra}
"""
    )
    return path


@contextmanager
def serving_at(
    home: Path, port: int, extra: str = "", drain_seconds: int = 10
) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """(the process, a client with the admin key)"""
    environment = {**os.environ, "LORAPLEX_ADMIN_KEY": ADMIN_KEY}
    process = subprocess.Popen(
        [LORAPLEX, "serve", "--config", str(write_config(home, port, extra, drain_seconds))],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30) as client:
            deadline = time.monotonic() + 30
            while True:
                try:
                    if client.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                assert time.monotonic() < deadline, process.communicate(timeout=5)
                time.sleep(0.05)
            yield process, client
    finally:
        process.kill()
        process.communicate()
