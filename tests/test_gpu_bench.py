"""The benchmark that a GPU is lent for, where there is none: it must not fail there for what can be seen here."""

from __future__ import annotations

import json
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
