"""A process that does foreign work line by line, bounded in time and memory; begun when needed, and after each end.

What it is asked to do may break it in any way; whoever asked learns that it did, and nobody else.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

_KEPT_BYTES = 256 * 2**20  # that a process may hold and still be kept
_ENVIRONMENT = ("PATH", "PYTHONPATH", "TZ", "LANG", "LC_ALL")  # nothing of its parent's secrets
_STAYS, _LEAVES = b"+", b"-"  # before each answer


class ProcessExhausted(Exception):
    """It ended amid its work: for what it used up, or because the work broke it."""


class BoundedProcess:
    """For any thread, one work at a time."""

    def __init__(self, module: str) -> None:
        """`module`: what is run, which calls `answer_lines`."""
        self._module = module
        self._guard = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, work: bytes) -> bytes:
        """The answer to a line of work. Blocks. Raises ProcessExhausted."""
        with self._guard:
            if self._process is None:
                self._process = self._begin()
            assert self._process.stdin is not None, "it is a pipe"
            assert self._process.stdout is not None, "it is a pipe"
            try:
                self._process.stdin.write(work + b"\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except (OSError, ValueError):  # ended meanwhile, or closed
                line = b""
            if not line.endswith(b"\n"):
                self._end()
                raise ProcessExhausted
            if line.startswith(_LEAVES):
                self._end()
        return line[1:-1]

    def close(self) -> None:
        """End the process."""
        process = self._process
        if process is not None:
            process.kill()  # whoever waits for it learns so
        with self._guard:
            self._end()

    def _begin(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
        self._finalizer = weakref.finalize(self, _stop, process)  # or it would outlive whoever forgot to close it
        return process

    def _end(self) -> None:
        if self._process is not None:
            self._finalizer()
            self._process = None


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def answer_lines(answer: Callable[[bytes], bytes], *, cpu_seconds: float, max_bytes: int) -> None:
    """What such a process does: answer each line of work with a line, until there is no more.

    It ends amid work that takes longer, of computing, so that a busy machine does not count, or more memory; and behind
    work that has left much in it. A signal to its whole group is for its parent, whose end it learns of by its input's.
    """
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    for signal_of_the_group in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signal_of_the_group, signal.SIG_IGN)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        answered = answer(line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        is_last = _resident_bytes() > _KEPT_BYTES
        sys.stdout.buffer.write((_LEAVES if is_last else _STAYS) + answered + b"\n")
        sys.stdout.buffer.flush()
        if is_last:
            return


def _resident_bytes() -> int:
    """Not `ru_maxrss`, which counts what the parent had when it began the process."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:  # another system
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
