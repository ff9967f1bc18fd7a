"""The pages of documentation: what is made from tables is up to date, names are complete, links lead somewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from support.error_codes import markdown

from loraplex.auth.limits.policy import Limits
from loraplex.gateway.problems import TABLE

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_is_there(page: Path) -> None:
    links = [link for link in _LINK.findall(_CODE.sub("", page.read_text())) if "://" not in link]
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_page_of_errors_is_up_to_date() -> None:
    page = ROOT / "docs" / "errors.md"
    assert page.read_text() == markdown(), "PYTHONPATH=.src:tests python -m support.error_codes > docs/errors.md"
    codes = {row.code for row in TABLE.values()} - {"adapter_error", "engine_error", "unauthorized"}  # of bases alone
    assert [code for code in sorted(codes) if f"`{code}`" not in page.read_text()] == []


def test_every_limit_is_in_the_page_of_tenants() -> None:
    page = (ROOT / "docs" / "tenants.md").read_text()
    assert [name for name in Limits.__struct_fields__ if f"`{name}`" not in page] == []


def test_every_module_of_the_engine_is_in_the_page_of_architecture() -> None:
    named = set(re.findall(r"`(?:engines/native/)?(\w+\.py)`", (ROOT / "docs" / "architecture.md").read_text()))
    assert sorted({path.name for path in (ROOT / "engines" / "native").glob("*.py")} - named) == []


def test_every_page_is_reached_from_the_readme() -> None:
    """Directly, or by a page that is."""
    reached, left = {PAGES[0]}, [PAGES[0]]
    while left:
        page = left.pop()
        for link in _LINK.findall(page.read_text()):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target not in reached and target.exists():
                reached.add(target)
                left.append(target)
    assert [page.name for page in PAGES if page.resolve() not in {path.resolve() for path in reached}] == []


def test_no_secret_of_a_server_in_the_checkout_would_be_added() -> None:
    names = ["loraplex.pepper", "loraplex-prompts.jsonl", "loraplex-files/a", "loraplex.db", "loraplex.db.journal/a"]
    told = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.stdout.split() == names
