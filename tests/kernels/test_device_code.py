"""What Triton makes of the kernels for GPUs: that it compiles, fits, spills nothing, and reads in long pieces.

No GPU is needed: see `support/absent_gpu.py`. Every other test of these kernels is interpreted where there is none.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Bytes of shared memory that a program may have, by compute capability (CUDA C++ Programming Guide, table of technical
# specifications): 8.0 is an A100, 8.6 an A10 or RTX 3090, 9.0 an H100 or H200.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
SPILLED = 32  # bytes of a thread's registers: a few that are kept for the end; what costs shows as hundreds
TARGETS = [
    (86, "bfloat16"),  # which has the least
    *(
        pytest.param(capability, dtype, marks=pytest.mark.slow)
        for capability in SHARED
        for dtype in ("bfloat16", "float16", "float32")
        if (capability, dtype) != (86, "bfloat16")
    ),
]


def absent_gpu(*arguments: str, cache_directory: Path) -> Any:
    path = os.pathsep.join(str(ROOT / name) for name in (".src", "tests", "bench"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache_directory)}
    command = [sys.executable, "-m", "support.absent_gpu", *arguments]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def kernels() -> set[str]:
    """Those that are launched: what a file calls with a grid."""
    files = (path.read_text() for path in (ROOT / "kernels").glob("*/*.py"))
    return {name for text in files for name in re.findall(r"^    (?:    )?(_\w+)\[\(", text, re.MULTILINE)}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
def test_kernels_compile_and_fit(capability: int, dtype: str, tmp_path: Path) -> None:
    compiled = absent_gpu(str(capability), dtype, cache_directory=tmp_path)
    assert {kernel["kernel"] for kernel in compiled} == kernels()
    assert not [kernel for kernel in compiled if kernel["shared"] > SHARED[capability]]
    assert not [kernel for kernel in compiled if kernel["stack"] > SPILLED]
    # A, B, keys and values come in pieces of 16 bytes, more of them on the way while some are multiplied; what a thread
    # may read by itself is one gain, or one sink
    names = ("_shrink", "_expand", "_attend_split", "_attend_tile")
    read_ahead = [kernel for kernel in compiled if kernel["kernel"] in names and "4097" not in kernel["case"]]
    assert all(16 in kernel["copies"] for kernel in read_ahead)
    assert not [kernel for kernel in read_ahead if kernel["narrow_loads"] > 1]


@pytest.mark.timeout(300)
def test_steps_of_all_sizes_find_their_kernels_compiled(tmp_path: Path) -> None:
    """Compiling takes a second, for which every stream would wait."""
    assert absent_gpu("90", "steps", cache_directory=tmp_path) == {}
