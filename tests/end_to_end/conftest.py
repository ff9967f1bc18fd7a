"""`loraplex demo` as a user starts it, once a run."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.demo import Demo
from support.worlds import SmallWorld, make_small_world

LORAPLEX = str(Path(sys.executable).parent / "loraplex")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The oracle shares the machine with the demo's own engine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_small_world(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def demo() -> Iterator[Demo]:
    process = subprocess.Popen(
        [LORAPLEX, "demo", "--port", "0", "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        ready, _, _ = select.select([process.stdout], [], [], 90)
        assert ready, "the demo was not ready in time"
        yield Demo(**json.loads(process.stdout.readline()), process=process)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=30)
        process.stdout.close()
    assert status == 0
