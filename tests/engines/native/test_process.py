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
