"""Runs `merge.py`, which needs torch, from a process that has none."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from loraplex.engines.adapters.recipe import MergeRecipe
from loraplex.engines.adapters.sources.base import Transfer
from loraplex.engines.errors import AdapterError, AdapterInvalid, from_wire

_PAUSE_SECONDS = 0.05


def merge_in_process(recipe: MergeRecipe, directory: Path, transfer: Transfer) -> None:
    """Write the merged adapter to a directory. Blocks. Raises AdapterError, or TransferStopped once nobody waits."""
    with tempfile.TemporaryFile() as said:
        command = [sys.executable, "-m", "loraplex.engines.adapters.merge", str(directory)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said) as process:
            try:
                assert process.stdin is not None, "it is a pipe"
                process.stdin.write(msgspec.json.encode(recipe))
                process.stdin.close()
                while process.poll() is None:
                    transfer.sleep(_PAUSE_SECONDS)
            finally:
                process.kill()
        said.seek(0)
        if process.returncode != 0:
            raise _error(said.read())


def _error(said: bytes) -> AdapterError:
    try:
        error = from_wire(*msgspec.json.decode(said, type=tuple[str, str, str | None]))
    except msgspec.DecodeError:
        return AdapterInvalid("the adapters could not be merged; the reason is in the log")
    return error if isinstance(error, AdapterError) else AdapterInvalid(str(error))
