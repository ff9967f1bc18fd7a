"""The order in which a server starts: what takes longest, the engine's process, begins first."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import TYPE_CHECKING

from loraplex.config.settings import Settings
from loraplex.engines.build import build_engine
from loraplex.engines.protocol import Progress

if TYPE_CHECKING:
    from loraplex.gateway.services import Services


def listen(settings: Settings) -> socket.socket:
    """The listening socket. Raises OSError where the address is taken."""
    listener = socket.create_server((settings.server.host, settings.server.port), backlog=1024)
    # Connections inherit it. uvloop sets it by itself; asyncio does not for a socket made like this one, and then an
    # answer's body waits 40 ms for the client to acknowledge its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def launch(
    settings: Settings,
    listener: socket.socket,
    on_progress: Callable[[Progress], None],
    on_open: Callable[[Services], None],
    on_ready: Callable[[Services], Awaitable[None]],
) -> None:
    """Serve on `listener` until a signal; `on_open` runs once the database is open, `on_ready` once it can generate.

    Raises CannotOpen, ModelNotServable, and whatever `on_ready` raises.
    """
    engine = build_engine(settings)
    starting = asyncio.create_task(engine.start(on_progress))
    try:
        # The gateway's own modules are imported while the engine's process imports torch.
        await asyncio.to_thread(import_module, "loraplex.gateway.server")
        from loraplex.gateway.server import serve
        from loraplex.gateway.services import open_services

        async with open_services(settings, engine) as services:
            on_open(services)

            async def settle() -> None:
                await on_ready(services)
                rest_garbage_collection()

            await serve(settings, services, listener, starting, settle)
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await engine.close()


def rest_garbage_collection() -> None:
    """Let this process look through what requests leave behind only, and not after every few hundred objects.

    For a process that is a server and nothing else: what is there now is never looked at again. To look at that too
    took a third of the time of busy streams. A request that is over leaves no cycles (a test sees to that); those in
    flight are about a hundred objects each, looked through in vain whenever so many more have come.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
