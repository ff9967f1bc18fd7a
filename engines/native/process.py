"""One worker process and the conversation with it, from its start to its end. torch is imported there only."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import cast

import zmq
import zmq.asyncio

from loraplex.config.settings import Settings
from loraplex.engines.errors import EngineDied, EngineError, EngineUnavailable, from_wire
from loraplex.engines.native.answer import Answer
from loraplex.engines.native.messages import (
    Command,
    Configure,
    Failure,
    GetResidency,
    Hello,
    Loading,
    Ready,
    Reply,
    StartFailed,
    Stepped,
    decode_report,
    encode,
    language,
)
from loraplex.engines.protocol import AdapterResidency, Embedding, Progress

_HEARTBEAT_SECONDS = 2.0
_LOOKS = "5000"  # a tenth of a millisecond: longer than threads that all run wait for each other in a step


class WorkerProcess:
    """A worker: what it was asked, what it answered, and whether it still lives.

    `ready` is set with the worker's own report, or with the error it ended with before. `residents` is what it had
    on its device at the last heartbeat, and until its first one what it has `inherited` from its predecessor.
    """

    def __init__(
        self,
        settings: Settings,
        context: zmq.asyncio.Context,
        address: str,
        on_progress: Callable[[Progress], None],
        inherited: Sequence[AdapterResidency] = (),
    ) -> None:
        self._settings = settings
        self._context = context
        self._on_progress = on_progress
        self._address = address
        self._socket: zmq.asyncio.Socket | None = None
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._call_numbers = itertools.count()
        self.answers: dict[str, Answer] = {}
        self.embeddings: dict[str, asyncio.Future[Embedding]] = {}
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.was_ready = False
        self.inherited = self.residents = tuple(inherited)

    async def run(self) -> EngineError:
        """The worker's life; returns why it ended, once everyone who waited for it has been told."""
        error: EngineError = EngineUnavailable("the server is stopping")
        try:
            error = await self._live()
            return error
        finally:
            if self._socket is not None:
                self._socket.close(linger=0)
            self._fail_all(error)

    async def _live(self) -> EngineError:
        try:
            socket = self._socket = self._bind()
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "loraplex.engines.native", self._address,
                stdin=asyncio.subprocess.PIPE, env=_environment(),
            )  # fmt: skip
        except (OSError, zmq.ZMQError) as error:
            return EngineDied(f"no engine process could be started: {error}")
        reader, heart = asyncio.create_task(self._read(socket)), asyncio.create_task(self._beat())
        waiter = asyncio.create_task(process.wait())
        try:
            done, _ = await asyncio.wait({reader, heart, waiter}, return_when=asyncio.FIRST_COMPLETED)
            if reader in done:
                return reader.result()
            if waiter in done:
                what_then = "; it is being restarted" if self.was_ready else " before it was ready"
                return EngineDied(f"the engine process ended with status {process.returncode}{what_then}")
            return heart.result()
        finally:
            reader.cancel()
            heart.cancel()
            if process.returncode is None:
                process.kill()
            await waiter

    def _bind(self) -> zmq.asyncio.Socket:
        """Raises ZMQError, as where no more files may be open."""
        socket = self._context.socket(zmq.PAIR)
        try:
            socket.set_hwm(0)
            socket.bind(self._address)
        except zmq.ZMQError:
            socket.close(linger=0)
            raise
        return socket

    @property
    def is_busy(self) -> bool:
        """Whether requests are in flight."""
        return bool(self.answers or self.embeddings)

    def send(self, command: Command) -> None:
        """Hand a command to the socket's own thread; never waits (no high-water mark), lost if the worker is gone."""
        if self._socket is None:
            return
        with contextlib.suppress(zmq.ZMQError):
            sent = cast("asyncio.Future[object]", self._socket.send(encode(command), zmq.NOBLOCK))
            if sent.done() and not sent.cancelled():
                sent.exception()  # the worker is gone, and `run` tells everyone

    async def call(self, command: Callable[[int], Command]) -> Reply:
        """The worker's reply. Raises the error in it, or the one that the worker ended with."""
        number = next(self._call_numbers)
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        try:
            self.send(command(number))
            reply = await answer
        finally:
            del self._calls[number]
        if reply.failure is not None:
            raise _error(reply.failure)
        return reply

    async def _beat(self) -> EngineError:
        """Ask after the worker again and again; returns when it does not answer in time, however long a step may be."""
        await asyncio.shield(self.ready)
        limit = self._settings.engine.unresponsive_seconds
        try:
            while True:
                await asyncio.sleep(min(_HEARTBEAT_SECONDS, limit))
                async with asyncio.timeout(limit):
                    known = (await self.call(GetResidency)).residency or []
                self.residents = tuple(found for found in known if found.tier == "device")
        except TimeoutError:
            return EngineDied(f"the engine process did not answer for {limit:g} s; it is being restarted")

    async def _read(self, socket: zmq.asyncio.Socket) -> EngineError:
        """Hand reports to whom they concern, until one says that the worker cannot start."""
        while True:
            report = decode_report(await socket.recv())
            match report:
                case Stepped(step, tokens, failed, embeddings):
                    for token in tokens:
                        if (answer := self.answers.get(token.request_id)) is not None:  # else aborted meanwhile
                            answer.add(token, step)
                    for embedding in embeddings:
                        self._embedded(embedding)
                    for failure in failed:
                        self._failed(failure.request_id, _error(failure.failure))
                case Reply(call):
                    if (reply := self._calls.get(call)) is not None and not reply.done():
                        reply.set_result(report)
                case Hello(spoken) if spoken != language():
                    return EngineUnavailable(
                        "the engine process is of another version of loraplex than this server, which was installed "
                        "while it ran: restart the server"
                    )
                case Hello():
                    self.send(Configure(self._settings))
                case Loading(progress):
                    self._on_progress(progress)
                case Ready():
                    self.was_ready = True
                    self.ready.set_result(report)
                case StartFailed(failure):
                    return _error(failure)

    def _embedded(self, found: Embedding) -> None:
        if (embedding := self.embeddings.get(found.request_id)) is not None and not embedding.done():
            embedding.set_result(found)

    def _failed(self, request_id: str, error: EngineError) -> None:
        if (answer := self.answers.get(request_id)) is not None:
            answer.fail(error)
        if (embedding := self.embeddings.get(request_id)) is not None and not embedding.done():
            embedding.set_exception(error)

    def _fail_all(self, error: EngineError) -> None:
        for request_id in (*self.answers, *self.embeddings):
            self._failed(request_id, error)
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error)
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # looked at: nobody need be waiting


def _environment() -> dict[str, str]:
    """The worker's. Unless it says how threads wait: GNU's would spin for many milliseconds, on a core that the thread
    they wait for may need, where other processes take some of the machine."""
    ours = {} if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys() else {"GOMP_SPINCOUNT": _LOOKS}
    return {**os.environ, **ours}


def _error(failure: Failure) -> EngineError:
    return from_wire(failure.kind, failure.message, failure.param)
