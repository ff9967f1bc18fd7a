"""loraplex usage | audit."""

from typing import Annotated

import typer

from loraplex.gateway.console.commands import Session, TenantOption, command, seconds_since_1970


def add_report_commands(app: typer.Typer) -> None:
    """Register these commands."""
    _add_usage(app)
    _add_audit(app)


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
