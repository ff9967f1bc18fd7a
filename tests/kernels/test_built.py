"""Which of the libraries beside a module is taken."""

from __future__ import annotations

import os
import shutil
import tomllib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from loraplex.kernels.built import library
from loraplex.kernels.dense import linear

BUILT = library(str(linear.__file__))

ROOT = Path(__file__).parents[2]


def test_every_library_was_built() -> None:
    """Each is optional, so that loraplex is installed where there is no compiler: one that fails is not missed else."""
    if shutil.which("cc") is None and "LORAPLEX_REQUIRE_SERVICES" not in os.environ:
        pytest.skip("no compiler")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = [extension["name"] for extension in project["tool"]["setuptools"]["ext-modules"]]
    modules = [ROOT / name.removeprefix("loraplex.").replace(".", "/").replace("/_", "/") for name in names]
    assert [module.name for module in modules if library(str(module.with_suffix(".py"))) is None] == []
    assert len(modules) > 1


@pytest.mark.skipif(BUILT is None, reason="no kernel was built: no compiler")
@pytest.mark.parametrize("suffix", EXTENSION_SUFFIXES)
def test_library_for_this_python_is_taken_and_none_for_another(tmp_path: Path, suffix: str) -> None:
    """Those for another load too, as they hold nothing of Python's, and may be older than the module."""
    assert BUILT is not None
    shutil.copy(BUILT._name, tmp_path / "_linear.cpython-31-other.so")
    shutil.copy(BUILT._name, tmp_path / f"_other{suffix}")
    assert library(str(tmp_path / "linear.py")) is None
    shutil.copy(BUILT._name, tmp_path / f"_found{suffix}")
    found = library(str(tmp_path / "found.py"))
    assert found is not None
    assert found._name == str(tmp_path / f"_found{suffix}")
