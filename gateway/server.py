"""Runs the application under uvicorn: listens, starts the engine behind it, drains on SIGTERM or Ctrl-C."""

import asyncio
import logging
import math
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import uvicorn

from loraplex.config.settings import Settings
from loraplex.engines.protocol import Engine
from loraplex.gateway.app import create_app
from loraplex.gateway.batches.answering import Answerer
from loraplex.gateway.batches.runner import BatchRunner
from loraplex.gateway.connections import protocol_for
from loraplex.gateway.services import Services

_log = logging.getLogger("loraplex.gateway")
# Longer than clients keep an idle connection (httpx, and so OpenAI's SDK, 5 s; aiohttp 15 s). uvicorn's own 5 s close
# it just as the next request is sent, which the client then sees as a server that left without an answer.
_KEEP_ALIVE_SECONDS = 75


class _Server(uvicorn.Server):
    """uvicorn's own would end the process by the signal it got; ours ends by returning, with status 0.

    And it would cut the streams that are open at the end of the drain; ours stops the engine then, so that each ends
    with an error its client can read. Batches stop at once, for they go on later.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Engine,
        runner: BatchRunner,
        drain_seconds: float,
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._runner = runner
        self._drain_seconds = drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(self._close_engine_after_drain())
        try:
            await self._runner.close()
            await super().shutdown(sockets)
        finally:
            closing.cancel()
            await asyncio.gather(closing, return_exceptions=True)

    async def _close_engine_after_drain(self) -> None:
        await asyncio.sleep(self._drain_seconds)
        await self._engine.close()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals reach the main thread only
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


async def serve(
    settings: Settings,
    services: Services,
    listener: socket.socket,
    started: Awaitable[object],
    on_ready: Callable[[], Awaitable[None]],
) -> None:
    """Serve until a signal. Health is answered while the engine loads; `on_ready` runs once it has `started`.

    Raises what `started` raises, such as ModelNotServable, and whatever `on_ready` raises. Closes the engine.
    """
    runner = BatchRunner(services.batches, services.files, settings.batches, settings.server.max_body_bytes)
    app = create_app(settings, services, runner)
    server = _Server(
        uvicorn.Config(
            app,
            http=protocol_for(settings.server),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            proxy_headers=bool(settings.server.trusted_proxies),
            forwarded_allow_ips=list(settings.server.trusted_proxies),
            timeout_graceful_shutdown=math.ceil(settings.server.drain_seconds) + 2,  # for what the engine cannot end
        ),
        services.engine,
        runner,
        settings.server.drain_seconds,
    )

    async def start() -> None:
        try:
            await started
            runner.start(Answerer(app, services.tenants))
            await on_ready()
        except BaseException:
            server.should_exit = True
            raise

    starting = asyncio.create_task(start())
    try:
        await server.serve(sockets=[listener])
        if starting.done():
            starting.result()
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await runner.close()
        await services.engine.close()
