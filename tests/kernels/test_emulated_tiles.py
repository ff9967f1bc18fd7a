"""The kernels' forms for tile registers (AMX), where no CPU has any: their tests, on instructions emulated in C."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EMULATED = ROOT / "tests" / "support" / "emulated_tiles.h"
KERNELS = {
    "dense/linear": "dense_linear",
    "lora/decode": "lora_decode",
    "attention/cpu_prefill": "attention_cpu_prefill",
}
TOLD = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()

pytestmark = [
    pytest.mark.skipif("amx_bf16" in TOLD, reason="this CPU has tile registers, which the kernels' own tests use"),
    pytest.mark.skipif("avx512_bf16" not in TOLD, reason="this CPU lacks the vectors that tiles are packed with"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no compiler"),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a package of the same sources, whose kernels were compiled for emulated registers."""
    directory = tmp_path_factory.mktemp("emulated")
    for part in (ROOT / ".src" / "loraplex").iterdir():
        (directory / "loraplex").mkdir(exist_ok=True)
        if part.name == "kernels":
            shutil.copytree(part, directory / "loraplex" / part.name)
        else:
            (directory / "loraplex" / part.name).symlink_to(part.resolve())
    for name in KERNELS:
        source = ROOT / "kernels" / f"{name}.c"
        built = directory / "loraplex" / "kernels" / name
        built = built.with_name(f"_{built.name}{EXTENSION_SUFFIXES[0]}")
        command = ["gcc", "-O2", "-fopenmp", "-shared", "-fPIC", f"-I{ROOT / 'kernels'}", "-include", str(EMULATED)]
        subprocess.run([*command, "-o", str(built), str(source)], check=True)
    return directory


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_pass_their_tests_in_emulated_tiles(package: Path, kernel: str) -> None:
    tests = ROOT / "tests" / "kernels" / f"test_{kernel.replace('/', '_')}.py"
    command = [
        sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(tests),
        "-o", f"pythonpath={package} {ROOT / 'tests'}", "-k", "not pairs and not widened and not panels",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) > 20
    assert "no tile registers" not in run.stdout, run.stdout[-4000:]
