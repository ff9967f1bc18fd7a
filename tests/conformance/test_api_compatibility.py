"""docs/api-compatibility.md says what the server does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.compatibility import SURFACES, Surface, markdown, rows
from support.gateway import Gateway, running, settings_in

PAGE = Path(__file__).parents[2] / "docs" / "api-compatibility.md"
REFUSED = [(surface, name) for surface in SURFACES for name, what in rows(surface).items() if "refused" in what]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
        with running(settings_in(tmp_path_factory.mktemp("gateway")), "k") as gateway:
            yield gateway


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "make it anew: python -m support.compatibility"


def test_every_field_that_openais_sdk_sends_has_a_row() -> None:
    for surface in SURFACES:
        assert surface.theirs <= rows(surface).keys(), surface.title
    assert sum(len(surface.theirs) for surface in SURFACES) > 80


@pytest.mark.parametrize(("surface", "name"), REFUSED, ids=lambda it: it if isinstance(it, str) else it.path)
def test_field_that_is_refused_is_named(gateway: Gateway, surface: Surface, name: str) -> None:
    body = {**surface.required, **({surface.inside: {name: True}} if surface.inside else {name: "x"})}
    with gateway.admin() as admin:
        response = admin.post(surface.path, json=body)
    assert response.status_code in (400, 422), response.text
    assert name in response.text


def test_field_that_nobody_knows_is_refused_everywhere(gateway: Gateway) -> None:
    for surface in SURFACES:
        body = {**surface.required, **({surface.inside: {"colour": 1}} if surface.inside else {"colour": 1})}
        with gateway.admin() as admin:
            response = admin.post(surface.path, json=body)
        assert response.status_code in (400, 422), response.text
        assert "colour" in response.text
