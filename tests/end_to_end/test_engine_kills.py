"""The engine process is killed again and again, or replaced, under load: the gateway answers throughout, and serves."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import httpx
import msgspec
import pytest
from support.gateway import Gateway, running, settings_in
from support.worlds import SmallWorld

from loraplex.config.settings import Adapters

ADMIN_KEY = "an-admin-key-of-the-tests"
NUM_CLIENTS = 6
BACK_WITHIN_SECONDS = 60.0  # a bound against hanging; a restart takes three to five seconds here
ENDS = {"done", "engine_died", "engine_unavailable"}


@pytest.fixture
def gateway(small: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", ADMIN_KEY)
    native = small.settings()
    root = Path(small.adapters["rank-4"].path).parent
    settings = msgspec.structs.replace(
        settings_in(tmp_path),
        model=native.model,
        engine=native.engine,
        adapters=Adapters(cache_dir=str(tmp_path / "cache"), local_roots=(str(root),), device_bytes=2**23),
    )
    with running(settings, ADMIN_KEY) as gateway:
        gateway.tenant_id, gateway.api_key = gateway.new_tenant("tests")
        with gateway.admin() as admin:
            for name, adapter in small.adapters.items():
                made = admin.post("/admin/v1/adapters", json={"name": name, "source": adapter.path})
                assert made.status_code == 201, made.text
        yield gateway


class Load:
    """Clients that stream without a pause until `stop`; how each of their requests ended."""

    def __init__(self, gateway: Gateway, models: list[str]) -> None:
        self._gateway = gateway
        self._models = models
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(NUM_CLIENTS)]
        self.ends: Counter[str] = Counter()
        self.faults: list[BaseException] = []

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wait_for_answers(self) -> None:
        """As many as there are clients, from now on."""
        done = self.ends["done"]
        while self.ends["done"] < done + NUM_CLIENTS and not self.faults:
            time.sleep(0.02)

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a request never ended"

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        try:
            with self._gateway.client() as client:
                while not self._stopped.is_set():
                    self.ends[self._one(client, rng)] += 1
        except BaseException as error:  # noqa: BLE001  looked at by the test
            self.faults.append(error)

    def _one(self, client: httpx.Client, rng: random.Random) -> str:
        body = {
            "model": rng.choice(self._models),
            "prompt": [rng.randrange(30, 300) for _ in range(8)],
            "max_tokens": 200,
            "ignore_eos": True,
            "stream": rng.random() < 0.7,
        }
        response = client.post("/v1/completions", json=body)
        if response.status_code != 200:
            time.sleep(0.05)  # a polite client waits; the answer says how long
            assert response.headers["retry-after"]
            return str(response.json()["error"]["code"])
        if not body["stream"]:
            assert response.json()["usage"]["completion_tokens"] == 200
            return "done"
        frames = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
        if frames[-1] == "[DONE]":
            return "done"
        return str(json.loads(frames[-1])["error"]["code"])


def engine_pids() -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "engines.native"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def kill_the_engine() -> None:
    for pid in engine_pids():
        os.kill(pid, signal.SIGKILL)


def wait_until_served(gateway: Gateway) -> float:
    """The gateway answers every time; in the end, that it is ready. Seconds until then."""
    began = time.monotonic()
    with gateway.client() as client:
        while client.get("/health").status_code != 200:
            assert time.monotonic() < began + BACK_WITHIN_SECONDS, "the engine did not come back"
            time.sleep(0.02)
    return time.monotonic() - began


@pytest.mark.parametrize("num_kills", [2, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_engine_killed_under_load_every_request_gets_its_end_and_service_returns(
    gateway: Gateway, small: SmallWorld, num_kills: int
) -> None:
    load, pauses = Load(gateway, ["small", *small.adapters]), []
    load.start()
    try:
        for number in range(num_kills):
            load.wait_for_answers()
            kill_the_engine()
            while gateway.services.engine.health().state == "ready":
                time.sleep(0.005)
            pauses.append(wait_until_served(gateway))
            assert load.faults == [], number
        load.wait_for_answers()
    finally:
        load.stop()
    print(f"{dict(load.ends)}; back after {median(pauses):.1f} s, at most {max(pauses):.1f} s")
    assert load.faults == []
    assert set(load.ends) <= ENDS
    assert load.ends["engine_died"] > 0
    stats = gateway.stats()
    assert (stats.num_restarts, stats.num_running, stats.num_waiting) == (num_kills, 0, 0)


def test_model_loaded_anew_under_load_no_request_is_dropped(gateway: Gateway, small: SmallWorld) -> None:
    load, [before] = Load(gateway, ["small", *small.adapters]), engine_pids()
    load.start()
    try:
        load.wait_for_answers()
        with gateway.admin() as admin:
            assert admin.post("/admin/v1/engine/reload", timeout=100).status_code == 200
        load.wait_for_answers()
        while before in (left := engine_pids()):  # until its last stream is over
            time.sleep(0.02)
    finally:
        load.stop()
    assert load.faults == []
    assert set(load.ends) == {"done"}
    assert len(left) == 1
    stats = gateway.stats()
    assert (stats.num_restarts, stats.num_running, stats.num_waiting, stats.total_failed) == (0, 0, 0, 0)
