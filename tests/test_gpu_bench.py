"""The benchmark that a GPU is lent for, where there is none: it must not fail there for what can be seen here."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(300)
def test_gpu_steps_measure_decodes_with_and_without_replays_and_prefills(tmp_path: Path) -> None:
    found = tmp_path / "steps.json"
    options = ["--shape", "toy", "--adapters", "2", "--rounds", "2", "--context", "64", "--chunk", "128"]
    command = [sys.executable, "bench/gpu_steps.py", *options, "--json", str(found)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240)
    figures = json.loads(found.read_text())
    decodes = {(f["batch"], f["num_adapters"], f["replayed"]) for f in figures if f["phase"] == "decode"}
    assert {(1, 0, False), (8, 0, False), (32, 2, False)} <= decodes
    assert {f["num_adapters"] for f in figures if f["phase"] == "prefill"} == {0, 1}
    assert all(f["milliseconds"] > 0 for f in figures)


def test_gpu_check_without_a_gpu_says_so_and_succeeds() -> None:
    done = subprocess.run(
        ["bash", "bench/gpu_check.sh"], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120,
        env={"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout == "no GPU here: nothing to check\n"


# Says that it has a GPU and what whole steps need, collects tests instead of running them, and times nothing.
STAND_IN = """#!/bin/bash
case "$*" in
    *get_device_name*) echo a-gpu ;;
    *"import msgspec"*) ;;
    "-m pytest"*) exec {python} "$@" --collect-only ;;
    bench/gpu_steps.py*) echo "[]" >"${{@: -1}}" ;;
    bench/kernel_table.py*) {python} "$1" --help && echo "[]" >"${{@: -1}}" ;;
    *) exec {python} "$@" ;;
esac
"""
SANITIZER = """#!/bin/bash
shift 2
exec "$@"
"""


@pytest.mark.timeout(300)
def test_gpu_check_finds_the_tests_of_the_device_and_times_kernels_where_little_is_installed(tmp_path: Path) -> None:
    for name, text in (
        ("python", STAND_IN.format(python=shlex.quote(sys.executable))),
        ("compute-sanitizer", SANITIZER),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "msgspec.py").write_text("raise ModuleNotFoundError(name='msgspec')\n")
    done = subprocess.run(
        ["bash", "bench/gpu_check.sh"], cwd=ROOT, capture_output=True, text=True, timeout=280,
        env={
            "PYTHON": "python", "PATH": f"{tmp_path}:/usr/bin:/bin", "OUT": str(tmp_path / "out"),
            "PYTHONPATH": str(tmp_path / "lacking"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": "",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    _, tests, sanitized, kernels, _, _ = re.split("== (?:tests|sanitizer|kernels|steps-.*?):", done.stdout)
    using = {path.name for path in (ROOT / "tests" / "kernels").glob("test_*.py") if "DEVICE" in path.read_text()}
    files = [line.partition("::")[0].rpartition("/")[2] for line in tests.splitlines() if "::" in line]
    assert set(files) == using
    assert files[0].startswith("test_lora_")
    assert sanitized.count("::") > 3
    assert "Each kernel by itself" in kernels
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"log", "kernels.json", "steps-1.1b.json", "steps-8b.json", "summary.md"}
    assert (tmp_path / "out" / "log").read_text() in done.stdout
