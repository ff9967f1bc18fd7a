"""A gateway over the demo's base, for benchmarks: started as a user starts it, stopped at the end.

Importing this first lets a benchmark import what the tests share, `support`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from loraplex.config.demo import MODEL_DIR

sys.path.append(str(Path(__file__).parent.parent / "tests"))

BASE = "loraplex-demo"
ADMIN_KEY = "an-admin-key-of-the-bench"
_START_SECONDS = 120.0


@dataclass(frozen=True)
class Served:
    """Where it is. `api_key` is a tenant's, who may fetch the adapters that its requests name."""

    url: str
    api_key: str
    log: Path

    def admin(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=600)

    def metrics(self) -> dict[tuple[str, str], float]:
        """(name, value of the label `tier` or "") -> the samples' sum."""
        with self.admin() as admin:
            text = admin.get("/metrics").raise_for_status().text
        found: dict[tuple[str, str], float] = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                series, _, value = line.rpartition(" ")
                name, _, labels = series.partition("{")
                key = name, labels.partition('tier="')[2].partition('"')[0]
                found[key] = found.get(key, 0.0) + float(value)
        return found


@contextmanager
def serve_demo(home: Path, **sections: dict[str, Any]) -> Iterator[Served]:
    """Serve the demo's base with an empty catalogue; `home` is an empty directory, `sections` are settings by table."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    defaults: dict[str, dict[str, Any]] = {
        "model": {"path": str(MODEL_DIR), "name": BASE, "dtype": "float32", "device": "cpu"},
        "server": {"port": port},
        "engine": {"kv_cache_bytes": 256 * 2**20, "num_threads": 1},
        "adapters": {"cache_dir": str(home / "cache")},
        "database": {"url": f"sqlite+aiosqlite:///{home}/db"},
        "auth": {"pepper_file": str(home / "pepper")},
        "files": {"directory": str(home / "files")},
    }
    tables = {name: {**table, **sections.get(name, {})} for name, table in defaults.items()}
    lines = [f"[{name}]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items())
             for name, table in tables.items()]  # fmt: skip
    (home / "config.toml").write_text("\n".join(lines))
    command = [str(Path(sys.executable).parent / "loraplex"), "serve", "--config", str(home / "config.toml")]
    log = home / "log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=sink, env={**os.environ, "LORAPLEX_ADMIN_KEY": ADMIN_KEY}
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await_health(url, process, log)
        yield Served(url, _new_tenant(url), log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_health(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the gateway did not start:\n{log.read_text()}")
        time.sleep(0.1)


def _new_tenant(url: str) -> str:
    """Its key."""
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {ADMIN_KEY}"}) as admin:
        tenant = admin.post("/admin/v1/tenants", json={"name": "bench"}).raise_for_status().json()["id"]
        limits = {"request_adapters": ["hf://*"]}
        admin.put(f"/admin/v1/tenants/{tenant}/limits", json=limits).raise_for_status()
        key: str = admin.post(f"/admin/v1/tenants/{tenant}/keys", json={}).raise_for_status().json()["key"]
    return key
