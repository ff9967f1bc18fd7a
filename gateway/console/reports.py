"""loraplex usage | audit | adapters."""

from typing import Annotated, Any

import typer

from loraplex.gateway.console.client import part
from loraplex.gateway.console.commands import Session, TenantOption, command, group, seconds_since_1970

AdapterName = Annotated[str, typer.Argument(help="An adapter's name.")]
_ADAPTER = ["name", "tenant_id", "version", "state", "tier", "pinned", "num_requests", "num_bytes", "source"]


def add_report_commands(app: typer.Typer) -> None:
    """Register these commands."""
    _add_usage(app)
    _add_audit(app)
    _add_adapters(group(app, "adapters", "Adapters of the catalogue."))


def _add_usage(app: typer.Typer) -> None:
    @command(app, "usage")
    def usage(
        session: Session,
        by: Annotated[str, typer.Option(help="Any of day, tenant, key, model, with commas.")] = "tenant",
        tenant: TenantOption = None,
        model: Annotated[str | None, typer.Option(help="Of one model.")] = None,
        since: Annotated[str | None, typer.Option(help="The first UTC day, as 2027-01-31.")] = None,
        until: Annotated[str | None, typer.Option(help="The last UTC day.")] = None,
    ) -> None:
        """What was used, summed up."""
        query = {
            "group_by": by.split(",") if by else None,
            "tenant_id": session.tenant(tenant) if tenant else None,
            "model": model,
            "first_day": since,
            "last_day": until,
        }
        answer = session.client.get("usage", query)
        rows = answer["data"]
        columns = [name for name in (rows[0] if rows else []) if any(row[name] is not None for row in rows)]
        if not rows and not session.as_json:
            session.say("Nothing was used.")
            return
        session.show(answer, rows, columns)


def _add_audit(app: typer.Typer) -> None:
    @command(app, "audit")
    def audit(
        session: Session,
        tenant: TenantOption = None,
        action: Annotated[str | None, typer.Option(help="Such as revoke_key.")] = None,
        key_id: Annotated[str | None, typer.Option(help="Who did it.")] = None,
        outcome: Annotated[str | None, typer.Option(help="ok, or an error's code.")] = None,
        since: Annotated[str | None, typer.Option(help="A date or time.")] = None,
        until: Annotated[str | None, typer.Option(help="A date or time.")] = None,
        after: Annotated[int | None, typer.Option(help="The last entry of the page before.")] = None,
        limit: Annotated[int, typer.Option(help="How many, at most 1000.")] = 50,
    ) -> None:
        """Who did what, newest first."""
        query = {
            "tenant_id": session.tenant(tenant) if tenant else None,
            "action": action,
            "key_id": key_id,
            "outcome": outcome,
            "since": seconds_since_1970(since),
            "until": seconds_since_1970(until),
            "after": after,
            "limit": limit,
        }
        answer = session.client.get("audit", query)
        session.show(
            answer, answer["data"], ["id", "at", "key_id", "action", "object", "outcome", "address", "details"]
        )
        if answer["has_more"]:
            session.say(f"There are more: --after {answer['last_id']}")


def _add_adapters(adapters: typer.Typer) -> None:
    def path_of(session: Session, name: str, tenant: str | None, verb: str = "") -> str:
        return f"adapters/{part(name)}{verb}" + (f"?tenant_id={part(session.tenant(tenant))}" if tenant else "")

    @command(adapters, "list")
    def list_adapters(session: Session, tenant: TenantOption = None) -> None:
        """All adapters, or those of a tenant."""
        answer = session.client.get("adapters", {"tenant_id": session.tenant(tenant) if tenant else None})
        session.show(answer, answer["data"], _ADAPTER)

    @command(adapters, "show")
    def show_adapter(session: Session, name: AdapterName, tenant: TenantOption = None) -> None:
        """One adapter."""
        answer: dict[str, Any] = session.client.get(path_of(session, name, tenant))
        session.show_one(answer if session.as_json else {**answer, "versions": len(answer["versions"])})

    @command(adapters, "add")
    def add_adapter(
        session: Session,
        name: AdapterName,
        source: Annotated[str, typer.Argument(help="A directory, hf://org/name, s3://bucket/prefix or https://…")],
        tenant: TenantOption = None,
        pinned: Annotated[bool, typer.Option(help="Keep it on the device.")] = False,
        wait: Annotated[bool, typer.Option(help="Until it is fetched and found to be good.")] = True,
    ) -> None:
        """Register an adapter for a tenant, or for all."""
        owner = session.tenant(tenant) if tenant else None
        body = {"name": name, "source": source, "tenant_id": owner, "pinned": pinned, "wait": wait}
        answer = session.client.post("adapters", body)
        session.show(answer, [answer], _ADAPTER)

    for verb, help in (
        ("pin", "Keep an adapter on the device."),
        ("unpin", "Let an adapter leave the device when others need the room."),
        ("warm", "Bring an adapter to the device now."),
        ("evict", "Take an adapter off the device."),
    ):
        _add_action(adapters, verb, help)

    @command(adapters, "delete")
    def delete_adapter(session: Session, name: AdapterName, tenant: TenantOption = None) -> None:
        """Take an adapter out of the catalogue."""
        session.client.delete(path_of(session, name, tenant))
        session.say(f"Deleted {name}.")


def _add_action(adapters: typer.Typer, verb: str, help: str) -> None:
    def act(session: Session, name: AdapterName, tenant: TenantOption = None) -> None:
        owner = f"?tenant_id={part(session.tenant(tenant))}" if tenant else ""
        answer = session.client.post(f"adapters/{part(name)}/{verb}{owner}")
        session.show(answer, [answer], _ADAPTER)

    act.__doc__ = help
    command(adapters, verb)(act)
