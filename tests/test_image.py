"""The container's image, without building it: what is installed when, and how it asks after its health."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.command_line import free_port, serving_at

ROOT = Path(__file__).parent.parent
DOCKERFILE = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text())


def sh(command: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """As the image runs it, with this Python."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment |= {"PATH": path, "PYTHONSAFEPATH": "1", "no_proxy": "*"}
    return subprocess.run(["/bin/sh", "-c", command], cwd=home, env=environment, capture_output=True, text=True)


def instruction(pattern: str) -> str:
    found = re.search(rf"^{pattern}$", DOCKERFILE, re.MULTILINE)
    assert found is not None
    return found[1]


def test_dependencies_are_installed_before_the_source_is_there(tmp_path: Path) -> None:
    stages = {name: text for text, name in re.findall(r"(?s)^FROM (\S+ AS (\S+)\n.*?)(?=^FROM|\Z)", DOCKERFILE, re.M)}
    assert [line for line in stages["dependencies"].splitlines() if line.startswith("COPY")] == [
        "COPY pyproject.toml ."
    ]
    assert stages["build"].startswith("dependencies AS build\nCOPY . .\n")
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    done = sh(instruction(r"RUN (python -c .* > requirements\.txt)"), tmp_path)
    assert done.returncode == 0, done.stderr
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["postgres"]
    assert (tmp_path / "requirements.txt").read_text().splitlines() == wanted


def test_nothing_of_a_directory_that_is_worked_in_is_imported() -> None:
    assert "PYTHONSAFEPATH=1" in instruction(r"ENV (.*)").split()


@pytest.mark.parametrize("port", [None, 1], ids=["served", "silent"])
def test_health_is_asked_of_the_port_that_is_said(tmp_path: Path, port: int | None) -> None:
    check = instruction(r"HEALTHCHECK .*? CMD (.*)")
    with serving_at(tmp_path, served := free_port()):
        done = sh(check, tmp_path, LORAPLEX_URL=f"http://127.0.0.1:{port or served}")
    assert (done.returncode == 0) == (port is None), done.stderr
