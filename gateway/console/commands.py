"""What every command has in common: where the server is, the key to it, and tables or JSON on standard output."""

import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loraplex.gateway.console.client import MISUSED, AdminClient, CommandFailed
from loraplex.gateway.printable import printable, printable_json

Url = Annotated[str, typer.Option("--url", envvar="LORAPLEX_URL", help="Where the server is.")]
Key = Annotated[
    str | None,
    typer.Option("--key", envvar="LORAPLEX_ADMIN_KEY", help="An admin key; others can read the command line, so "
                 "rather set the variable.", show_default=False),
]  # fmt: skip
AsJson = Annotated[bool, typer.Option("--json", help="Print what the server answered.")]
Tenant = Annotated[str, typer.Argument(help="A tenant's id or name.")]
TenantOption = Annotated[str | None, typer.Option("--tenant", help="A tenant's id or name.")]


class Session:
    """A command's server and screen."""

    def __init__(self, client: AdminClient, as_json: bool) -> None:
        self.client = client
        self.as_json = as_json
        # where lines are read by other programs, a row is one line, however long
        self._screen = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 100_000)

    def tenant(self, name_or_id: str) -> str:
        """The id. Raises CommandFailed where no tenant is called so."""
        if name_or_id.startswith("tenant_"):
            return name_or_id
        for tenant in self.client.get("tenants")["data"]:
            if tenant["name"] == name_or_id:
                return str(tenant["id"])
        raise CommandFailed(f"There is no tenant {name_or_id!r}.", 1)

    def show(self, answer: Any, rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> None:
        """The answer as JSON, or the rows as a table of some of their columns."""
        if self.as_json:
            _print_json(answer)
            return
        table = Table(box=None, header_style="bold", pad_edge=False)
        names = list(columns)
        for name in names:
            table.add_column(name.replace("_", " "), overflow="fold")
        for row in rows:
            table.add_row(*(_shown(_cell(name, row.get(name))) for name in names))
        self._screen.print(table)

    def show_one(self, answer: Mapping[str, Any]) -> None:
        """One object: a line for each of its fields that is set."""
        if self.as_json:
            _print_json(answer)
            return
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in answer.items():
            if value is not None:
                table.add_row(f"[bold]{_shown(name.replace('_', ' '))}[/]", _shown(_cell(name, value)))
        self._screen.print(table)

    def say(self, text: str) -> None:
        """Something was done; scripts that want JSON read the exit code."""
        if not self.as_json:
            self._screen.print(_shown(text))


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function of a session and its own arguments; failures become a line and an exit code."""

    def register(work: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(work)
        def run(*, url: str, key: str | None, as_json: bool, **own: Any) -> None:
            try:
                work(Session(AdminClient(url, key), as_json), **own)
            except CommandFailed as error:
                fail(error)

        own = [part for part in inspect.signature(work).parameters.values() if part.name != "session"]
        keyword = inspect.Parameter.KEYWORD_ONLY
        common = [
            inspect.Parameter("url", keyword, default="http://127.0.0.1:8000", annotation=Url),
            inspect.Parameter("key", keyword, default=None, annotation=Key),
            inspect.Parameter("as_json", keyword, default=False, annotation=AsJson),
        ]
        run.__signature__ = inspect.Signature([*(part.replace(kind=keyword) for part in own), *common])  # type: ignore[attr-defined]
        app.command(name)(run)
        return run

    return register


def group(app: typer.Typer, name: str, help: str) -> typer.Typer:
    """Commands that belong together."""
    made = typer.Typer(no_args_is_help=True, help=help, pretty_exceptions_enable=False)
    app.add_typer(made, name=name)
    return made


def fail(error: CommandFailed) -> NoReturn:
    screen = Console(stderr=True, highlight=False, emoji=False)
    screen.print(f"[red]error:[/red] {_shown(str(error))}", soft_wrap=True)
    raise typer.Exit(error.exit_code)


def seconds_since_1970(text: str | None) -> float | None:
    """A date or time as people write it; UTC where it says no zone. Raises CommandFailed."""
    if text is None:
        return None
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        message = f"{text!r} is no date or time: write 2027-01-31, or 2027-01-31T12:00:00+01:00."
        raise CommandFailed(message, MISUSED) from None
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()


def _print_json(answer: Any) -> None:
    print(printable_json(json.dumps(answer, indent=2, ensure_ascii=False)))


def _shown(text: str) -> str:
    """As rich's markup of what the screen shows as it is."""
    return escape(printable(text))


def _cell(name: str, value: Any) -> str:
    if value is None or value == {} or value == []:
        return "-"
    if isinstance(value, float | int) and (name == "at" or name.endswith(("_at", "_until"))):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, dict):
        return ", ".join(f"{key}={_cell(key, part)}" for key, part in value.items() if part is not None) or "-"
    if isinstance(value, list):
        return ", ".join(_cell(name, part) for part in value)
    return str(value)
