"""loraplex routes."""

from typing import Annotated, Any

import typer

from loraplex.gateway.console.client import MISUSED, CommandFailed, part, query_of
from loraplex.gateway.console.commands import Session, TenantOption, command, group

RouteName = Annotated[str, typer.Argument(help="A route's name.")]
Targets = Annotated[
    list[str], typer.Argument(help="MODEL=WEIGHT, such as support=90 support@3=10; a model is an adapter or a version.")
]
_ROUTE = ["name", "tenant_id", "targets", "created_at", "last_used_at"]


def add_route_commands(app: typer.Typer) -> None:
    """Register this group."""
    routes = group(app, "routes", "Names that lead to several adapters, each with a share of the requests.")

    @command(routes, "list")
    def list_routes(session: Session, tenant: TenantOption = None) -> None:
        """All routes, or those of a tenant."""
        answer = session.client.get("routes", {"tenant_id": session.tenant(tenant) if tenant else None})
        session.show(answer, [_row(route) for route in answer["data"]], _ROUTE)

    @command(routes, "show")
    def show_route(session: Session, name: RouteName, tenant: TenantOption = None) -> None:
        """One route."""
        _show(session, session.client.get(_path(session, name, tenant)))

    @command(routes, "create")
    def create_route(session: Session, name: RouteName, targets: Targets, tenant: TenantOption = None) -> None:
        """A new route for a tenant, or for all; the same user always takes the same way."""
        owner = session.tenant(tenant) if tenant else None
        body = {"name": name, "targets": read_targets(targets), "tenant_id": owner}
        _show(session, session.client.post("routes", body))

    @command(routes, "change")
    def change_route(session: Session, name: RouteName, targets: Targets, tenant: TenantOption = None) -> None:
        """Other targets or weights, from the next request on."""
        _show(session, session.client.put(_path(session, name, tenant), {"targets": read_targets(targets)}))

    @command(routes, "delete")
    def delete_route(session: Session, name: RouteName, tenant: TenantOption = None) -> None:
        """Take a route out of the catalogue; its targets stay."""
        session.client.delete(_path(session, name, tenant))
        session.say(f"Deleted {name}.")


def read_targets(pairs: list[str]) -> list[dict[str, object]]:
    """MODEL=WEIGHT as the API takes them; the server judges them. Raises CommandFailed for what is no such pair."""
    found: list[dict[str, object]] = []
    for pair in pairs:
        model, equals, weight = pair.rpartition("=")
        try:
            found.append({"model": model, "weight": float(weight)})
        except ValueError:
            equals = ""
        if not equals:
            raise CommandFailed(f"{pair!r}: write a target as MODEL=WEIGHT.", MISUSED)
    return found


def _path(session: Session, name: str, tenant: str | None) -> str:
    return f"routes/{part(name)}{query_of({'tenant_id': session.tenant(tenant) if tenant else None})}"


def _show(session: Session, answer: dict[str, Any]) -> None:
    session.show_one(answer if session.as_json else _row(answer))


def _row(route: dict[str, Any]) -> dict[str, Any]:
    return {**route, "targets": [f"{target['model']}={target['weight']:g}" for target in route["targets"]]}
