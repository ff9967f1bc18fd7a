"""kill -9 while adapters are fetched, uploaded, registered, updated, evicted and deleted: all or nothing of each."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import catalogue_worker
from support.adapter_files import adapter_files, write_files

from loraplex.engines.adapters.disk import DiskCache
from loraplex.engines.adapters.manifest import check
from loraplex.gateway.catalogue import Catalogue


class Workers:
    """Lives of a catalogue's process, each ended by kill -9."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def live(self, seed: int, seconds: float) -> None:
        """From its first operation on for so long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seed} {seconds}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == f"{-signal.SIGKILL}\n", "it ended by itself; see its traceback"


@contextmanager
def workers(home: Path) -> Iterator[Workers]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, catalogue_worker.__file__, str(home)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Workers(process)
        finally:
            process.kill()


def told(home: Path) -> dict[str, str | None]:
    """What the log says last of each name: its content, "" for none, None where an operation was under way."""
    known: dict[str, str | None] = {}
    for line in (home / "log").read_text().splitlines():
        match line.split():
            case ["begin", name]:
                known[name] = None
            case ["has", name, content]:
                known[name] = content
            case ["gone", name]:
                known[name] = ""
    return known


async def settled(catalogue: Catalogue) -> None:
    async with asyncio.timeout(60):
        while any(v.state in ("registered", "fetching") for entry in catalogue.everything() for v in entry.versions):
            await asyncio.sleep(0.01)


async def inspect(home: Path) -> int:
    """Everything that must hold after a kill; how many versions were left under way."""
    known = told(home)
    async with catalogue_worker.catalogue_in(home) as (catalogue, _):
        num_resumed = sum(v.state != "ready" for entry in catalogue.everything() for v in entry.versions)
        await settled(catalogue)
        for name, content in known.items():
            if content:
                assert catalogue.has(("", name)), f"{name} was lost"
            elif content == "":
                assert not catalogue.has(("", name)), f"{name} came back"
        for entry in catalogue.everything():
            assert [(v.state, v.reason) for v in entry.versions] == [("ready", "")] * len(entry.versions)
            assert entry.version(entry.current_version) is not None, f"{entry.name} is there by half"
            for version in entry.versions:
                adapter = (await catalogue.route(f"{entry.name}@{version.number}", catalogue_worker.CALLER)).adapter
                assert adapter is not None
                assert adapter.id == version.adapter_id
                check(Path(adapter.path), read_bytes=True)
            content = known.get(entry.name)
            if content and content != "-":
                assert entry.shown.adapter_id == content, f"{entry.name} is another version"
    for tier in ("cache", "cache-uploads"):
        cache = DiskCache(home / tier, 2**40)
        assert list((home / tier / "staging").iterdir()) == []
        for object_id in cache.ids():
            cache.verify(object_id)
    assert DiskCache(home / "cache", 2**40).usage()[1] <= catalogue_worker.DISK_BYTES
    return num_resumed


@pytest.mark.parametrize("rounds", [12, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
async def test_killed_at_any_moment_nothing_is_lost_or_there_by_half(tmp_path: Path, rounds: int) -> None:
    chance = random.Random(11)
    for number in range(catalogue_worker.NUM_NAMES):
        write_files(tmp_path / "local" / str(number), adapter_files(number, size=catalogue_worker.SIZE))
    num_resumed = 0
    with workers(tmp_path) as lives:
        for seed in range(rounds):
            await asyncio.to_thread(lives.live, seed, chance.uniform(0.0, 0.25))
            num_resumed += await inspect(tmp_path)
    lines = (tmp_path / "log").read_text().splitlines()
    contents = {line.split()[2] for line in lines if line.startswith("has ")} - {"-"}
    assert len(contents) > rounds // 4
    print(
        f"{rounds} kills in {len(lines)} lines of {len(contents)} adapters; {num_resumed} versions were taken up again"
    )
