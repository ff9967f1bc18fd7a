"""What authentication, limits and the ledger add to a request, on the embedded default (SQLite, in-process limits).

    python bench/overhead.py --requests 2000 --rounds 10

Two gateways over the echo engine: one that knows its callers, holds every kind of limit of a tenant and of its key, and
writes each request down; and one that lets anybody in and writes nothing. One client asks them in turns, a block of
requests each, one request after another on one connection, for the shortest non-streamed answer. Printed are the
medians, their difference, and the servers' CPU time a request, which holds the writer's part as well.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from loraplex.auth.caller import Caller
from loraplex.auth.limits.admission import Admission
from loraplex.auth.limits.memory import MemoryStore
from loraplex.auth.limits.policy import Limits
from loraplex.auth.metering import NoBooks
from loraplex.auth.store.database import open_database
from loraplex.auth.tenants import Tenants
from loraplex.config.settings import Auth, Database, EngineSettings, FileSettings, Model, Server, Settings
from loraplex.gateway.accounts import Accounts
from loraplex.gateway.launch import listen, rest_garbage_collection
from loraplex.gateway.server import serve
from loraplex.gateway.services import Services, open_services

PLENTY = 10**12
EVERY_LIMIT = Limits(
    requests_per_minute=PLENTY,
    input_tokens_per_minute=PLENTY,
    output_tokens_per_minute=PLENTY,
    concurrent_requests=PLENTY,
    tokens_per_day=PLENTY,
    tokens_per_month=PLENTY,
)
PAUSE_SECONDS = 0.1  # between blocks: what one server still writes is not the other's
BODY = json.dumps({"model": "echo", "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}]}).encode()


class OpenDoor(Tenants):
    """Lets in whoever comes."""

    async def authenticate(self, key: str | None) -> Caller:
        return Caller(tenant_id="tenant", tenant_name="tenant", key_id="key", role="inference")


async def without_anything(services: Services, settings: Settings) -> Services:
    """The same services; nobody is looked up, nothing limited, nothing written."""
    tenants = OpenDoor(await open_database(settings.database.url), b"none")
    accounts = Accounts(Admission(MemoryStore(NoBooks())), NoBooks(), tenants)
    return msgspec.structs.replace(services, tenants=tenants, accounts=accounts)


async def run_server(kind: str, home: Path) -> None:
    """Serve until SIGTERM; prints its port and a key once it can."""
    settings = Settings(
        model=Model(path=str(home), name="echo"),
        server=Server(port=0),
        engine=EngineSettings(kind="echo"),
        database=Database(url=f"sqlite+aiosqlite:///{home / kind}.db"),
        auth=Auth(pepper_file=str(home / f"{kind}.pepper")),
        files=FileSettings(directory=str(home / "files")),
    )
    with listen(settings) as listener:
        async with open_services(settings) as services:
            tenant = await services.tenants.create_tenant("tenant", EVERY_LIMIT)
            key = (await services.tenants.create_key(tenant.id, "key", limits=EVERY_LIMIT)).key
            served = services if kind == "with" else await without_anything(services, settings)

            async def on_ready() -> None:
                rest_garbage_collection()
                print(json.dumps({"port": listener.getsockname()[1], "key": key}), flush=True)

            await serve(settings, served, listener, served.engine.start(lambda _: None), on_ready)


class Gateway:
    """One server process and a connection to it."""

    def __init__(self, kind: str, home: Path) -> None:
        command = [sys.executable, __file__, "--serve", kind, "--home", str(home)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        ready = self._read()
        self._headers = {"Authorization": f"Bearer {ready['key']}", "Content-Type": "application/json"}
        self._port = ready["port"]

    def ask(self, num_requests: int) -> list[float]:
        """Milliseconds until each answer is there, on one connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        times = []
        for _ in range(num_requests + 1):
            began = time.perf_counter()
            connection.request("POST", "/v1/chat/completions", BODY, self._headers)
            answer = connection.getresponse()
            answer.read()
            times.append((time.perf_counter() - began) * 1e3)
            if answer.status != 200:
                raise RuntimeError(f"the gateway answered {answer.status}")
        connection.close()
        return times[1:]  # the first one connects

    def cpu_seconds(self) -> float:
        """What the process has used by now."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the gateway did not start")
        return json.loads(line)


def measure(options: argparse.Namespace, home: Path) -> None:
    gateways = {kind: Gateway(kind, home) for kind in ("with", "without")}
    times: dict[str, list[float]] = {kind: [] for kind in gateways}
    cpu: dict[str, list[float]] = {kind: [] for kind in gateways}
    try:
        for number in range(options.rounds + 1):
            order = list(gateways.items())[:: 1 if number % 2 else -1]
            for kind, gateway in order:
                before = gateway.cpu_seconds()
                block = gateway.ask(options.requests)
                time.sleep(PAUSE_SECONDS)
                if number:  # the first round warms up
                    times[kind] += block
                    cpu[kind].append((gateway.cpu_seconds() - before) / options.requests * 1e3)
    finally:
        for gateway in gateways.values():
            gateway.close()
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    print(f"{options.rounds} rounds of {options.requests} requests each, milliseconds a request")
    for kind in gateways:
        print(f"  {kind:8} p50 {medians[kind]:.3f}   CPU {statistics.median(cpu[kind]):.3f}")
    added = statistics.median(cpu["with"]) - statistics.median(cpu["without"])
    print(f"  added    p50 {medians['with'] - medians['without']:.3f}   CPU {added:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="of one block")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--serve", choices=("with", "without"), help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        uvloop.run(run_server(options.serve, options.home))
        return
    with tempfile.TemporaryDirectory(prefix="loraplex-overhead-") as home:
        measure(options, Path(home))


if __name__ == "__main__":
    main()
