"""loraplex tenants | keys | admin-keys | limits | secrets."""

import json
import sys
from typing import Annotated, Any

import typer

from loraplex.gateway.console.client import MISUSED, CommandFailed, part
from loraplex.gateway.console.commands import Session, Tenant, command, group, seconds_since_1970

KeyId = Annotated[str, typer.Argument(help="A key's id, as `keys list` shows it.")]
OfKey = Annotated[str | None, typer.Option("--key-id", help="A key of the tenant; else the tenant itself.")]
SecretName = Annotated[str, typer.Argument(help="hub_token, s3_token or https_token.")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(help="NAME=VALUE, such as requests_per_minute=60, weight=3 or allowed_models=team/*,base; "
                   "NAME=none takes the limit away."),
]  # fmt: skip
_LISTS = ("allowed_models", "allowed_ips", "allowed_adapter_sources")


def add_account_commands(app: typer.Typer) -> None:
    """Register these groups."""
    _add_tenants(group(app, "tenants", "Tenants of the server."))
    _add_keys(group(app, "keys", "API keys of a tenant."))
    _add_admin_keys(group(app, "admin-keys", "Keys of operators."))
    _add_limits(group(app, "limits", "What a tenant or a key may use."))
    _add_secrets(group(app, "secrets", "Tokens that the server uses for a tenant; it never shows them."))


def _add_tenants(tenants: typer.Typer) -> None:
    @command(tenants, "list")
    def list_tenants(session: Session) -> None:
        """All tenants."""
        answer = session.client.get("tenants")
        session.show(answer, answer["data"], ["id", "name", "created_at", "limits"])

    @command(tenants, "show")
    def show_tenant(session: Session, tenant: Tenant) -> None:
        """One tenant."""
        session.show_one(session.client.get(f"tenants/{part(session.tenant(tenant))}"))

    @command(tenants, "create")
    def create_tenant(session: Session, name: Annotated[str, typer.Argument()], limits: Settings = None) -> None:
        """A new tenant, with limits if some are given."""
        session.show_one(session.client.post("tenants", {"name": name, "limits": read_limits(limits)}))

    @command(tenants, "delete")
    def delete_tenant(
        session: Session,
        tenant: Tenant,
        yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    ) -> None:
        """A tenant with its keys, secrets and adapters. Requests that run under its keys end."""
        tenant_id = session.tenant(tenant)
        if not yes and not typer.confirm(f"Delete tenant {tenant} with all its keys and adapters?", err=True):
            raise CommandFailed("Nothing was deleted.", MISUSED)
        session.client.delete(f"tenants/{part(tenant_id)}")
        session.say(f"Deleted {tenant_id}.")


def _add_keys(keys: typer.Typer) -> None:
    @command(keys, "list")
    def list_keys(session: Session, tenant: Tenant) -> None:
        """The keys of a tenant, revoked ones included."""
        answer = session.client.get(f"tenants/{part(session.tenant(tenant))}/keys")
        session.show(answer, answer["data"], ["id", "name", "role", "last_four", "expires_at", "revoked_at", "limits"])

    @command(keys, "create")
    def create_key(
        session: Session,
        tenant: Tenant,
        name: Annotated[str, typer.Option(help="To tell it by.")] = "default",
        role: Annotated[str, typer.Option(help="inference or tenant-admin.")] = "inference",
        expires: Annotated[str | None, typer.Option(help="A date or time.")] = None,
        limits: Settings = None,
    ) -> None:
        """A new key, shown this once."""
        body = {"name": name, "role": role, "limits": read_limits(limits), "expires_at": seconds_since_1970(expires)}
        session.show_one(session.client.post(f"tenants/{part(session.tenant(tenant))}/keys", body))

    @command(keys, "rotate")
    def rotate_key(
        session: Session,
        tenant: Tenant,
        key_id: KeyId,
        overlap_seconds: Annotated[float, typer.Option(help="How long the old secret is good beside the new.")] = 3600,
    ) -> None:
        """A new secret for a key, shown this once."""
        path = f"tenants/{part(session.tenant(tenant))}/keys/{part(key_id)}/rotate"
        session.show_one(session.client.post(path, {"overlap_seconds": overlap_seconds}))

    @command(keys, "revoke")
    def revoke_key(session: Session, tenant: Tenant, key_id: KeyId) -> None:
        """Refuse a key from now on, and end what runs under it."""
        session.client.delete(f"tenants/{part(session.tenant(tenant))}/keys/{part(key_id)}")
        session.say(f"Revoked {key_id}.")


def _add_admin_keys(keys: typer.Typer) -> None:
    @command(keys, "list")
    def list_admin_keys(session: Session) -> None:
        """All but the one that the server's environment brings."""
        answer = session.client.get("admin-keys")
        session.show(answer, answer["data"], ["id", "name", "last_four", "created_at", "revoked_at"])

    @command(keys, "create")
    def create_admin_key(session: Session, name: Annotated[str, typer.Argument(help="To tell it by.")]) -> None:
        """A new admin key, shown this once."""
        session.show_one(session.client.post("admin-keys", {"name": name}))

    @command(keys, "revoke")
    def revoke_admin_key(session: Session, key_id: KeyId) -> None:
        """Refuse an admin key from now on."""
        session.client.delete(f"admin-keys/{part(key_id)}")
        session.say(f"Revoked {key_id}.")


def _add_limits(limits: typer.Typer) -> None:
    def path_of(session: Session, tenant: str, key_id: str | None) -> str:
        own = f"tenants/{part(session.tenant(tenant))}"
        return f"{own}/limits" if key_id is None else f"{own}/keys/{part(key_id)}/limits"

    def show(session: Session, answer: dict[str, Any]) -> None:
        rows = [
            {"limit": name, "set_here": answer["limits"][name], "in_force": in_force}
            for name, in_force in answer["effective"].items()
            if in_force is not None
        ]
        session.show(answer, rows, ["limit", "set_here", "in_force"])

    @command(limits, "show")
    def show_limits(session: Session, tenant: Tenant, key_id: OfKey = None) -> None:
        """The limits set for a tenant or a key, and what is in force."""
        show(session, session.client.get(path_of(session, tenant, key_id)))

    @command(limits, "set")
    def set_limits(
        session: Session,
        tenant: Tenant,
        limits: Settings = None,
        key_id: OfKey = None,
        replace: Annotated[bool, typer.Option("--replace", help="Take away all that is not named.")] = False,
    ) -> None:
        """Change limits, while requests run."""
        path = path_of(session, tenant, key_id)
        kept = {} if replace else session.client.get(path)["limits"]
        wanted = {**kept, **read_limits(limits)}
        show(session, session.client.put(path, {name: value for name, value in wanted.items() if value is not None}))


def _add_secrets(secrets: typer.Typer) -> None:
    @command(secrets, "list")
    def list_secrets(session: Session, tenant: Tenant) -> None:
        """Their names."""
        answer = session.client.get(f"tenants/{part(session.tenant(tenant))}/secrets")
        session.show(answer, answer["data"], ["name", "created_at", "updated_at"])

    @command(secrets, "put")
    def put_secret(session: Session, tenant: Tenant, name: SecretName) -> None:
        """Set or replace a secret; its value is read from standard input, or asked for."""
        value = typer.prompt("Value", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.read().strip()
        path = f"tenants/{part(session.tenant(tenant))}/secrets/{part(name)}"
        session.show_one(session.client.put(path, {"value": value}))

    @command(secrets, "delete")
    def delete_secret(session: Session, tenant: Tenant, name: SecretName) -> None:
        """Forget a secret."""
        session.client.delete(f"tenants/{part(session.tenant(tenant))}/secrets/{part(name)}")
        session.say(f"Deleted {name}.")


def read_limits(settings: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE as the API takes them; the server judges them. Raises CommandFailed for what is no such pair."""
    found: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals:
            raise CommandFailed(f"{setting!r}: write a limit as NAME=VALUE.", MISUSED)
        found[name] = None if value == "none" else value.split(",") if name in _LISTS else _number(value)
    return found


def _number(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
