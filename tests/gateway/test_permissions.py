"""Every route, every role, own, foreign, shared and missing objects: exactly the documented status."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from litestar import Litestar
from support.gateway import Gateway, settings_in
from support.permissions import OK, ROLES, ROWS, Row, World, markdown

from loraplex.gateway.app import create_routes
from loraplex.gateway.batches.runner import BatchRunner


def routes_of(app: Litestar) -> Iterator[tuple[str, str]]:
    for route in app.routes:
        for method in getattr(route, "methods", ()):
            if method != "OPTIONS":  # Litestar's own
                yield method, re.sub(r"\{[^}]*\}", "{}", route.path_format)


def test_every_route_has_its_row(gateway: Gateway, tmp_path: Path) -> None:
    settings, services = settings_in(tmp_path), gateway.services
    runner = BatchRunner(services.batches, services.files, settings.batches, settings.server.max_body_bytes)
    there = set(routes_of(create_routes(settings, services, runner)))
    known = {row.route for row in ROWS}
    missing = sorted(there - known)
    advice = "\n".join(f'    Row("{method}", "{path}", ...),' for method, path in missing)
    assert not missing, f"add who may do this to ROWS in tests/support/permissions.py:\n{advice}"
    assert not known - there, "ROWS in tests/support/permissions.py has routes that are gone"
    assert len({(row.method, row.path) for row in ROWS}) == len(ROWS)


@pytest.fixture(scope="module")
def world(gateway: Gateway) -> World:
    return World(gateway)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.method} {row.path}")
def test_every_role_gets_the_documented_status(gateway: Gateway, world: World, row: Row) -> None:
    wrong = []
    for whose, by_role in row.access.statuses.items():
        for role in ROLES:
            is_consumed = by_role[role] == OK and row.changes_something
            status = (World(gateway) if is_consumed else world).call(row, role, whose)
            if status != row.expected(role, whose):
                wrong.append(f"{role}, {whose} object: {status} instead of {row.expected(role, whose)}")
    assert not wrong, f"{row.method} {row.path}:\n" + "\n".join(wrong)


def test_foreign_and_missing_objects_answer_alike(gateway: Gateway, world: World) -> None:
    """But for the name that was asked for, not a byte tells one from the other."""
    keys = world.keys
    tenant, model = world.tenants[1], "of-the-other"
    world.make("/admin/v1/adapters", name=model, source=str(gateway.adapter_dir / "shared"), tenant_id=tenant)
    with gateway.client(keys["tenant-admin"]) as client:
        for path, foreign, missing in (
            ("/admin/v1/tenants/{}", tenant, "tenant_0123456789abcdef"),
            ("/admin/v1/tenants/{}/keys", tenant, "tenant_0123456789abcdef"),
            ("/v1/models/{}", model, "of-no-one"),
        ):
            answers = [client.get(path.format(name)) for name in (foreign, missing)]
            assert answers[0].status_code == answers[1].status_code == 404
            assert answers[0].text.replace(foreign, "X") == answers[1].text.replace(missing, "X")


def test_page_of_permissions_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "permissions.md"
    assert page.read_text() == markdown(), "PYTHONPATH=.src:tests python -m support.permissions > docs/permissions.md"
