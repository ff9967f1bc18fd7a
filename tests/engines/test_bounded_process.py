"""Processes for foreign work: each way in which work may end them, and that the next work finds a new one."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.engines.bounded_process import BoundedProcess, ProcessExhausted

MODULE = """
import os, signal, time
from loraplex.engines.bounded_process import answer_lines

kept = []

def answer(line):
    if line == b"crash\\n":
        os.kill(os.getpid(), signal.SIGSEGV)
    if line == b"spin\\n":
        while True:
            pass
    if line == b"sleep\\n":
        time.sleep(1.3)
    if line == b"hoard\\n":
        kept.append(b"x" * 2**30)
    if line == b"grow\\n":
        kept.append(b"x" * 300 * 2**20)
    return str(os.getpid()).encode()

answer_lines(answer, cpu_seconds=1.0, max_bytes=2**30)
"""


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BoundedProcess]:
    (tmp_path / "foreign_work.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    made = BoundedProcess("foreign_work")
    yield made
    made.close()


def test_work_is_answered_by_one_process(process: BoundedProcess) -> None:
    assert process.ask(b"work") == process.ask(b"more work") != b""


@pytest.mark.parametrize("work", [b"crash", b"spin", b"hoard"])
def test_work_that_ends_its_process_says_so_and_the_next_has_another(process: BoundedProcess, work: bytes) -> None:
    first = process.ask(b"work")
    with pytest.raises(ProcessExhausted):
        process.ask(work)
    assert process.ask(b"work") not in (first, b"")


def test_time_that_is_not_computed_does_not_count(process: BoundedProcess) -> None:
    assert process.ask(b"sleep") == process.ask(b"work")


def test_process_that_has_grown_answers_and_is_replaced(process: BoundedProcess) -> None:
    first = process.ask(b"grow")
    assert process.ask(b"work") not in (first, b"")


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_the_whole_group_are_for_its_parent(process: BoundedProcess, told: signal.Signals) -> None:
    pid = process.ask(b"work")
    os.kill(int(pid), told)
    time.sleep(0.1)
    assert process.ask(b"work") == pid


def test_process_that_nobody_closes_ends_with_its_owner(process: BoundedProcess) -> None:
    forgotten = BoundedProcess("foreign_work")
    pid = int(forgotten.ask(b"work"))
    del forgotten
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
