"""A worker process that never was: whoever waits for it is told why."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import zmq.asyncio

from loraplex.config.settings import Model, Settings
from loraplex.engines.errors import EngineDied
from loraplex.engines.native.process import WorkerProcess


@pytest.mark.parametrize("missing", ["python", "socket"])
async def test_run_that_starts_no_process_tells_everyone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    folder = tmp_path / "missing" if missing == "socket" else tmp_path
    if missing == "python":
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    context = zmq.asyncio.Context()
    settings = Settings(model=Model(path=str(tmp_path), name="none"))
    worker = WorkerProcess(settings, context, f"ipc://{folder}/1", lambda progress: None)
    error = await worker.run()
    assert isinstance(error, EngineDied)
    assert "no engine process could be started: " in str(error)
    with pytest.raises(EngineDied, match="no engine process could be started"):
        await worker.ready
    context.term()  # would wait for a socket that is open


@pytest.mark.parametrize(
    "said",
    [{}, {"GOMP_SPINCOUNT": "infinity"}, {"OMP_WAIT_POLICY": "active"}],
    ids=["by default", "a count", "a policy"],
)
async def test_workers_threads_spin_for_as_long_as_the_environment_says_and_else_shortly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, str]
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    teller = tmp_path / "python"
    teller.write_text(f"#!/bin/sh\nenv > {tmp_path}/environment\n")
    teller.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(teller))
    context = zmq.asyncio.Context()
    settings = Settings(model=Model(path=str(tmp_path), name="none"))
    await WorkerProcess(settings, context, f"ipc://{tmp_path}/1", lambda progress: None).run()
    told = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line)
    found = {name: told[name] for name in names if name in told}
    assert found == (said or {"GOMP_SPINCOUNT": "5000"})
    context.term()


async def test_worker_that_ends_before_it_is_ready_is_not_said_to_be_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is known to whoever began it: a server that starts ends."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    context = zmq.asyncio.Context()
    settings = Settings(model=Model(path=str(tmp_path), name="none"))
    error = await WorkerProcess(settings, context, f"ipc://{tmp_path}/1", lambda progress: None).run()
    assert isinstance(error, EngineDied)
    assert str(error) == "the engine process ended with status 3 before it was ready"
    context.term()
