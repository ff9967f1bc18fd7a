"""The packaging rules: five folders, one import name, and nothing that could shadow other people's packages."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("auth", "config", "engines", "gateway", "kernels")


def test_folders_are_namespace_portions_behind_links() -> None:
    assert {path.name for path in (ROOT / ".src" / "loraplex").iterdir()} == set(FOLDERS)
    for folder in FOLDERS:
        assert (ROOT / ".src" / "loraplex" / folder).readlink() == Path("../..") / folder
        assert not (ROOT / folder / "__init__.py").exists()


def test_no_top_level_kernels_is_ours() -> None:
    found = find_spec("kernels")
    assert found is None or found.loader is None or str(ROOT) not in str(found.origin)


@pytest.mark.parametrize(
    "module",
    ["gateway.cli", "gateway.app", "auth.tenants", "engines.native.engine", "engines.upstream.engine", "engines.echo"],
)
def test_gateway_process_never_imports_torch(module: str) -> None:
    code = f"import sys, loraplex.{module}; print(sorted({{'torch', 'triton', 'transformers'}} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_project_speaks_only_of_itself() -> None:
    """No machine's paths in anything that is shipped."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    texts = [path for path in listed.stdout.split("\0") if path.endswith((".py", ".md", ".toml", ".json", ".sh"))]
    assert texts
    wrong = [path for path in texts if "/" + "work/" in (ROOT / path).read_text(encoding="utf-8")]
    assert wrong == []
