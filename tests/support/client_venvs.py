"""Clients whose pins clash with ours: each in a virtual environment of its own, made once and kept between runs.

An environment is complete or it is made anew: a marker is its last file. Its directory is named for what it holds, so
a changed requirement makes another one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.services import missing

INSTALL_SECONDS = 300


def client_python(name: str, requirements: Sequence[str]) -> Path:
    """The interpreter of an environment with these requirements, as pip writes them.

    The first time takes up to INSTALL_SECONDS: mark the test with a timeout beyond that. Skips it, or fails it where
    LORAPLEX_REQUIRE_SERVICES is set, if they cannot be installed.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(json.dumps([version, sorted(requirements)]).encode()).hexdigest()[:16]
    home = _cache_dir() / f"{name}-{digest}"
    with _locked(home.with_suffix(".lock")):
        if not (home / "complete").is_file():
            shutil.rmtree(home, ignore_errors=True)
            _make(home, name, requirements)
    return home / "bin" / "python"


def node_package(name: str) -> Path:
    """The directory of a package from npm, in a directory of its own. Skips or fails as `client_python` does."""
    home = _cache_dir() / f"node-{name}"
    with _locked(home.with_suffix(".lock")):
        if not (home / "complete").is_file():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(home), name]
            try:
                installed = _run(install, INSTALL_SECONDS)
            except (OSError, subprocess.TimeoutExpired) as error:
                missing(f"the client {name}", error)
            if installed.returncode:
                missing(f"the client {name}", installed.stderr.strip()[-800:])
            (home / "complete").write_text(name)
    return home / "node_modules" / name


def run_in(python: Path, script: Path, arguments: Sequence[str] = (), *, seconds: float = 100) -> Any:
    """Runs a script of ours beside the client; what it printed last, which is JSON. Fails with all it said."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    done = _run([str(python), "-I", str(script), *arguments], seconds, clean)
    assert done.returncode == 0, f"{script.name} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    lines = done.stdout.strip().splitlines()
    assert lines, f"{script.name} printed nothing:\n{done.stderr}"
    return json.loads(lines[-1])


def _make(home: Path, name: str, requirements: Sequence[str]) -> None:
    uv = [sys.executable, "-m", "uv", "--quiet"]  # pip takes minutes to settle so many pins
    created = _run([*uv, "venv", "--python", sys.executable, str(home)], INSTALL_SECONDS)
    assert created.returncode == 0, created.stderr
    install = [*uv, "pip", "install", "--python", str(home / "bin" / "python")]
    try:
        installed = _run([*install, *requirements], INSTALL_SECONDS)
    except subprocess.TimeoutExpired as error:
        missing(f"the client {name}", error)
    if installed.returncode:
        missing(f"the client {name}", installed.stderr.strip()[-800:])
    (home / "complete").write_text("\n".join(requirements))


def _run(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)


def _cache_dir() -> Path:
    """This user's own; one that somebody else made is not used."""
    directory = Path(tempfile.gettempdir()) / f"loraplex-clients-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    assert directory.stat().st_uid == os.getuid(), f"{directory} belongs to somebody else"
    return directory


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time makes an environment."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
