"""loraplex demo | serve | check-config, and the operators' commands of `console/`.

Nothing here imports the gateway's application, which takes longer than any of the console's commands: see `launch`.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from errno import EADDRINUSE
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import msgspec
import typer
import uvloop
from rich.console import Console
from rich.markup import escape

from loraplex.config.settings import Settings, SettingsError, load_settings, require_long_admin_key
from loraplex.engines.errors import EngineError
from loraplex.engines.protocol import Progress
from loraplex.gateway.console.accounts import add_account_commands
from loraplex.gateway.console.adapters import add_adapter_commands
from loraplex.gateway.console.reports import add_report_commands
from loraplex.gateway.console.routes import add_route_commands
from loraplex.gateway.demo import DemoAccess, demo_settings, furnish, greeting
from loraplex.gateway.errors import CannotOpen
from loraplex.gateway.launch import launch, listen
from loraplex.gateway.printable import PrintableFormatter, printable_lines

if TYPE_CHECKING:
    from loraplex.gateway.services import Services

_screen = Console(stderr=True, highlight=False, emoji=False)
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
add_account_commands(app)
add_adapter_commands(app)
add_route_commands(app)
add_report_commands(app)

Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)]


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"loraplex {version('loraplex')}")
        raise typer.Exit


@app.callback()
def common(
    shows_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """One base model, thousands of LoRA adapters, many tenants, one OpenAI-compatible address."""


@app.command("demo")
def demo_command(
    port: Port = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON once ready.")] = False,
) -> None:
    """Serve the shipped model and its adapters on embedded defaults, and say how to talk to them."""
    with demo_settings(host, port) as settings:
        _run(settings, lambda services, url: _present_demo(settings, services, url, as_json))


@app.command("serve")
def serve_command(
    config: Annotated[Path, typer.Option(help="A TOML file; see config/example.toml.")],
    random_weights: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG", help="For benchmarks: serve this config.json's shape with random weights."),
    ] = None,
) -> None:
    """Serve what a settings file describes."""
    settings = _load(config)
    if random_weights is not None:
        directory = random_weights if random_weights.is_dir() else random_weights.parent
        model = msgspec.structs.replace(settings.model, path=str(directory), random_weights=True)
        settings = msgspec.structs.replace(settings, model=model)
    _run(settings, _present_server, _show_new_admin_key)


@app.command("check-config")
def check_config_command(config: Annotated[Path, typer.Argument(help="A TOML file.")]) -> None:
    """Check a settings file and print every setting as it takes effect."""
    from loraplex.gateway.config_check import faults

    settings = _load(config)
    if found := list(faults(settings)):
        _fail("\n".join(f"{config}: {fault}" for fault in found))
    print(msgspec.json.format(msgspec.json.encode(_without_passwords(settings)), indent=2).decode())


def _without_passwords(settings: Settings) -> Settings:
    """The same settings, fit to be shown."""
    from sqlalchemy import make_url

    def shown(url: str) -> str:
        return make_url(url).render_as_string(hide_password=True)

    database = msgspec.structs.replace(settings.database, url=shown(settings.database.url))
    redis_url = settings.limits.redis_url
    limits = msgspec.structs.replace(settings.limits, redis_url=redis_url and shown(redis_url))
    return msgspec.structs.replace(settings, database=database, limits=limits)


def main() -> None:
    """The console script."""
    app()


async def _present_demo(settings: Settings, services: Services, base_url: str, as_json: bool) -> None:
    access: DemoAccess = await furnish(settings, services, base_url)
    print(msgspec.json.encode(access).decode() if as_json else greeting(access), flush=True)


async def _present_server(services: Services, base_url: str) -> None:
    _screen.print(f"Serving {services.engine.info().base_model} at {base_url}", markup=False, soft_wrap=True)


def _show_new_admin_key(services: Services) -> None:
    """Before the engine starts, for it may fail to: the database knows the key by then, and no later start shows it."""
    if services.new_admin_key is not None:
        print(f"Admin key (shown this once): {services.new_admin_key}", flush=True)


def _run(
    settings: Settings,
    present: Callable[[Services, str], Awaitable[None]],
    on_open: Callable[[Services], None] = lambda services: None,
) -> None:
    """Listen, start, serve; ends with status 0 on SIGTERM or Ctrl-C, with 2 and the reason where it cannot start."""
    log = logging.StreamHandler(sys.stderr)
    log.setFormatter(PrintableFormatter("%(asctime)s gateway %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[log])
    for noisy in ("uvicorn", "httpx", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        require_long_admin_key(settings.auth)
        listener = listen(settings)
    except SettingsError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"cannot listen on {settings.server.host}:{settings.server.port}: {_why(error)}")
    with listener:
        try:
            uvloop.run(_serve(settings, listener, present, on_open))
        except (CannotOpen, EngineError) as error:
            _fail(str(error))


async def _serve(
    settings: Settings,
    listener: socket.socket,
    present: Callable[[Services, str], Awaitable[None]],
    on_open: Callable[[Services], None],
) -> None:
    host, port = listener.getsockname()[:2]
    base_url = f"http://{host}:{port}/v1"
    with _screen.status("Starting") as status:

        async def on_ready(services: Services) -> None:
            status.stop()
            await present(services, base_url)

        def on_progress(progress: Progress) -> None:
            status.update(f"{progress.stage} ({progress.fraction:.0%})")
            if not _screen.is_terminal:
                _screen.print(f"{progress.stage} ({progress.fraction:.0%})")

        await launch(settings, listener, on_progress, on_open, on_ready)


def _why(error: OSError) -> str:
    """Of a socket: its own text, without the address that `socket.create_server` puts behind it."""
    if error.errno == EADDRINUSE:
        return "another program listens there; stop it, or choose another port"
    return (error.strerror or str(error)).partition(" (while ")[0]


def _load(config: Path) -> Settings:
    try:
        return load_settings(config)
    except SettingsError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    _screen.print(f"[red]error:[/red] {escape(printable_lines(message))}", soft_wrap=True)
    raise typer.Exit(2)
