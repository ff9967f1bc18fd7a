"""One operation is one file, with its reference in it, one test and one benchmark of the same name."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOT_OPERATIONS = {"__init__", "table"}
OF_ALL = {"test_built", "test_device_code", "test_emulated_tiles", "test_pairing"}  # tests of no single operation


def operations() -> set[str]:
    return {
        f"{path.parent.name}/{path.stem}"
        for path in (ROOT / "kernels").glob("*/*.py")
        if path.stem not in NOT_OPERATIONS
    }


def test_every_operation_has_its_reference() -> None:
    lacking = {op for op in operations() if "_reference(" not in (ROOT / "kernels" / f"{op}.py").read_text()}
    # whose formulas and references are those of lora/grouped, attention/paged and attention/rotary
    assert lacking == {"lora/decode", "attention/cpu_decode", "attention/cpu_prefill", "attention/cpu_rotary"}
    assert operations() >= {"lora/shrink", "lora/expand", "attention/decode", "attention/prefill"}


def test_every_operation_has_its_test() -> None:
    tests = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    assert tests - OF_ALL == {f"test_{op.replace('/', '_')}" for op in operations()}


def test_every_operation_has_its_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")  # where its cases are
    table = _loaded(ROOT / "bench" / "kernel_table.py")
    assert set(table.ON_CPU) | set(table.ON_GPU) == operations()


def _loaded(path: Path) -> Any:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
