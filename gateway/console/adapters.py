"""loraplex adapters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from loraplex.engines.adapters.sources.selection import WANTED
from loraplex.gateway.console.client import MISUSED, CommandFailed, part, query_of
from loraplex.gateway.console.commands import Session, TenantOption, command, group

AdapterName = Annotated[str, typer.Argument(help="An adapter's name.")]
Source = Annotated[str, typer.Argument(help="A directory, hf://org/name, s3://bucket/prefix or https://…")]
Wait = Annotated[bool, typer.Option(help="Until it is fetched and found to be good.")]
_ADAPTER = ["name", "tenant_id", "version", "state", "tier", "pinned", "num_requests", "num_bytes", "source", "reason"]
_VERSION = ["version", "is_current", "state", "adapter_id", "num_bytes", "created_at", "source", "revision", "reason"]


def add_adapter_commands(app: typer.Typer) -> None:
    """Register this group."""
    adapters = group(app, "adapters", "Adapters of the catalogue.")
    _add_views(adapters)
    _add_arrivals(adapters)
    _add_versions(adapters)
    for verb, help in (
        ("pin", "Keep an adapter on the device."),
        ("unpin", "Let an adapter leave the device when others need the room."),
        ("warm", "Bring an adapter to the device now."),
        ("evict", "Take an adapter off the device."),
    ):
        _add_action(adapters, verb, help)
    _add_delete(adapters)


def path_of(session: Session, name: str, tenant: str | None, verb: str = "", **query: object) -> str:
    """The address of an adapter, or of something that can be done to it."""
    owner = session.tenant(tenant) if tenant else None
    return f"adapters/{part(name)}{verb}{query_of({'tenant_id': owner, **query})}"


def _show(session: Session, answer: Any) -> None:
    session.show(answer, [answer], _ADAPTER)


def _add_views(adapters: typer.Typer) -> None:
    @command(adapters, "list")
    def list_adapters(
        session: Session,
        tenant: TenantOption = None,
        after: Annotated[str | None, typer.Option(help="The last adapter of the page before.")] = None,
        limit: Annotated[int | None, typer.Option(help="How many, at most 1000; left out: all.")] = None,
    ) -> None:
        """All adapters, or those of a tenant, oldest first."""
        owner = session.tenant(tenant) if tenant else None
        answer = session.client.get("adapters", {"tenant_id": owner, "after": after, "limit": limit})
        session.show(answer, answer["data"], _ADAPTER)
        if answer["has_more"]:
            session.say(f"There are more: --after {answer['last_id']}")

    @command(adapters, "show")
    def show_adapter(session: Session, name: AdapterName, tenant: TenantOption = None) -> None:
        """One adapter."""
        answer: dict[str, Any] = session.client.get(path_of(session, name, tenant))
        session.show_one(answer if session.as_json else {**answer, "versions": len(answer["versions"])})

    @command(adapters, "versions")
    def list_versions(session: Session, name: AdapterName, tenant: TenantOption = None) -> None:
        """The versions of an adapter, oldest first."""
        answer = session.client.get(path_of(session, name, tenant, "/versions"))
        session.show(answer, answer["data"], _VERSION)


def _add_arrivals(adapters: typer.Typer) -> None:
    @command(adapters, "add")
    def add_adapter(
        session: Session,
        name: AdapterName,
        source: Source,
        tenant: TenantOption = None,
        pinned: Annotated[bool, typer.Option(help="Keep it on the device.")] = False,
        wait: Wait = True,
    ) -> None:
        """Register an adapter for a tenant, or for all."""
        owner = session.tenant(tenant) if tenant else None
        body = {"name": name, "source": source, "tenant_id": owner, "pinned": pinned, "wait": wait}
        _show(session, session.client.post("adapters", body))

    @command(adapters, "upload")
    def upload_adapter(
        session: Session,
        name: AdapterName,
        directory: Annotated[Path, typer.Argument(help="What PEFT's save_pretrained wrote, on this machine.")],
        tenant: TenantOption = None,
        update: Annotated[bool, typer.Option("--update", help="As a new version of an adapter.")] = False,
        wait: Wait = True,
    ) -> None:
        """Register an adapter by sending its files, or make them its next version."""
        query = {"name": name, "update": _word(update), "wait": _word(wait)}
        _show(session, session.client.send(_upload(session, tenant, query), _files(directory)))

    @command(adapters, "validate")
    def validate_adapter(
        session: Session,
        source: Source,
        tenant: TenantOption = None,
        upload: Annotated[bool, typer.Option("--upload", help="A directory on this machine; send its files.")] = False,
    ) -> None:
        """Tell what registering would find, and register nothing."""
        if upload:
            answer = session.client.send(_upload(session, tenant, {"dry_run": "true"}), _files(Path(source)))
        else:
            body = {"source": source, "tenant_id": session.tenant(tenant) if tenant else None}
            answer = session.client.post("adapters/validate", body)
        found = ("state", "source", "revision", "adapter_id", "num_bytes", "card", "notes")
        session.show_one(answer if session.as_json else {name: answer[name] for name in found})


def _add_versions(adapters: typer.Typer) -> None:
    @command(adapters, "update")
    def update_adapter(
        session: Session,
        name: AdapterName,
        source: Annotated[str | None, typer.Argument(help="Left out: what its source has by now.")] = None,
        tenant: TenantOption = None,
        wait: Wait = True,
    ) -> None:
        """A new version of an adapter; requests go to it once it is ready."""
        path = path_of(session, name, tenant)
        wanted = session.client.get(path)["source"] if source is None else source
        _show(session, session.client.patch(path, {"source": wanted, "wait": wait}))

    @command(adapters, "rollback")
    def roll_back(
        session: Session,
        name: AdapterName,
        version: Annotated[str | None, typer.Argument(help="A number, or 8 or more digits of its adapter id; "
                                                           "left out: the one before.")] = None,
        tenant: TenantOption = None,
    ) -> None:  # fmt: skip
        """Send requests to an earlier version."""
        path = path_of(session, name, tenant, "/rollback")
        _show(session, session.client.post(path, None if version is None else {"version": version}))

    @command(adapters, "retry")
    def retry(
        session: Session,
        name: AdapterName,
        version: Annotated[int | None, typer.Argument(help="Left out: the newest that failed.")] = None,
        tenant: TenantOption = None,
    ) -> None:
        """Bring a failed version once more."""
        path = path_of(session, name, tenant, "/retry")
        _show(session, session.client.post(path, None if version is None else {"version": version}))


def _add_action(adapters: typer.Typer, verb: str, help: str) -> None:
    def act(session: Session, name: AdapterName, tenant: TenantOption = None) -> None:
        _show(session, session.client.post(path_of(session, name, tenant, f"/{verb}")))

    act.__doc__ = help
    command(adapters, verb)(act)


def _add_delete(adapters: typer.Typer) -> None:
    @command(adapters, "delete")
    def delete_adapter(
        session: Session,
        name: AdapterName,
        tenant: TenantOption = None,
        drain: Annotated[
            bool, typer.Option("--drain", help="Also while requests use it: they finish, new ones find nothing.")
        ] = False,
    ) -> None:
        """Take an adapter out of the catalogue."""
        session.client.delete(path_of(session, name, tenant, drain=_word(drain)))
        session.say(f"Deleted {name}.")


def _upload(session: Session, tenant: str | None, query: Mapping[str, object]) -> str:
    owner = session.tenant(tenant) if tenant else None
    return f"adapters/upload{query_of({**query, 'tenant_id': owner})}"


def _files(directory: Path) -> list[Path]:
    """An adapter's files among those of a directory; the server says which are missing. Raises CommandFailed."""
    files = [directory / name for name in WANTED if (directory / name).is_file()]
    if not files:
        raise CommandFailed(f"{str(directory)!r} is no directory with files of an adapter.", MISUSED)
    return files


def _word(flag: bool) -> str:
    return "true" if flag else "false"
