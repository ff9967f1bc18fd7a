"""The native engine as the gateway sees it: starts the worker process, speaks to it, restarts it when it dies.

Tokens become text here, off the worker's step. torch is imported in the worker only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from typing import cast

import msgspec
import zmq
import zmq.asyncio

from loraplex.config.settings import Settings
from loraplex.engines.errors import EngineDied, EngineError, EngineUnavailable, ModelNotServable, from_wire
from loraplex.engines.native.detokenizer import Detokenizer
from loraplex.engines.native.messages import (
    Command,
    Configure,
    End,
    Failure,
    GetResidency,
    GetStats,
    Hello,
    Inspect,
    Load,
    Loading,
    Pin,
    Ready,
    Reply,
    StartFailed,
    Stepped,
    Submit,
    Token,
    Unload,
    decode_report,
    encode,
)
from loraplex.engines.protocol import (
    Adapter,
    AdapterCard,
    AdapterResidency,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    Health,
    HealthState,
    Progress,
    TokenEvent,
)
from loraplex.engines.tokenizer import HubTokenizer

_BACKOFF_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
_MAX_FAST_DEATHS = len(_BACKOFF_SECONDS)

_log = logging.getLogger("loraplex.engine")


class _Arrived(msgspec.Struct, frozen=True):
    """A token of a request and the step that made it."""

    step: int
    token: Token


class NativeEngine:
    """Implements the engine protocol over one worker process."""

    tokenizer: HubTokenizer

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state: HealthState = "starting"
        self._detail = ""
        self._answers: dict[str, asyncio.Queue[_Arrived | EngineError]] = {}
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._call_numbers = itertools.count()
        self._num_starts = 0
        self._on_progress: Callable[[Progress], None] = lambda progress: None
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self, on_progress: Callable[[Progress], None]) -> EngineInfo:
        self.tokenizer = HubTokenizer(self._settings.model.directory)
        self._context = zmq.asyncio.Context()
        self._directory = tempfile.TemporaryDirectory(prefix="loraplex-")
        self._on_progress = on_progress
        on_progress(Progress(stage="starting the engine process", fraction=0.0))
        ready = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(ready))
        await ready
        return self.info()

    def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        self._require_ready()
        answers: asyncio.Queue[_Arrived | EngineError] = asyncio.Queue()
        self._answers[request.request_id] = answers
        detokenizer = Detokenizer(self.tokenizer.stream(), request.sampling.stop)
        is_over = False
        try:
            self._send(Submit(request))
            while not is_over:
                arrived = await answers.get()
                if isinstance(arrived, EngineError):
                    is_over = True
                    raise arrived
                is_over = arrived.token.finish_reason is not None
                event = _event(arrived, detokenizer)
                if event.finish_reason and not is_over:
                    is_over = True
                    self._send(End(request.request_id, aborted=False))
                yield event
        finally:
            del self._answers[request.request_id]
            if not is_over:
                self._send(End(request.request_id, aborted=True))

    async def inspect(self, adapter: Adapter) -> AdapterCard:
        reply = await self._call(lambda call: Inspect(call, adapter))
        assert reply.card is not None
        return reply.card

    async def load(self, adapter: Adapter) -> None:
        await self._call(lambda call: Load(call, adapter))

    async def unload(self, adapter_id: str) -> None:
        await self._call(lambda call: Unload(call, adapter_id))

    async def pin(self, adapter: Adapter, *, pinned: bool) -> None:
        await self._call(lambda call: Pin(call, adapter, pinned))

    async def residency(self) -> list[AdapterResidency]:
        return (await self._call(GetResidency)).residency or []

    async def stats(self) -> EngineStats:
        reply = await self._call(GetStats)
        assert reply.stats is not None
        return msgspec.structs.replace(reply.stats, num_restarts=self._num_starts - 1)

    def health(self) -> Health:
        return Health(state=self._state, detail=self._detail)

    async def close(self, drain_seconds: float = 0.0) -> None:
        if self._state in ("ready", "restarting"):
            self._state = "draining"
        deadline = asyncio.get_running_loop().time() + drain_seconds
        while self._answers and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        if self._supervisor is None:
            return
        supervisor, self._supervisor = self._supervisor, None
        supervisor.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await supervisor
        self._fail_all(EngineUnavailable("the server is stopping"))
        self._context.destroy(linger=0)
        self._directory.cleanup()

    def _require_ready(self) -> None:
        if self._state != "ready":
            raise EngineUnavailable(f"the engine is {self._state}; try again shortly")

    async def _call(self, command: Callable[[int], Command]) -> Reply:
        self._require_ready()
        call = next(self._call_numbers)
        answer = asyncio.get_running_loop().create_future()
        self._calls[call] = answer
        try:
            self._send(command(call))
            reply: Reply = await answer
        finally:
            del self._calls[call]
        if reply.failure is not None:
            raise _error(reply.failure)
        return reply

    def _send(self, command: Command) -> None:
        """Hand a command to the socket's own thread; never waits (no high-water mark), lost if the worker is gone."""
        with contextlib.suppress(zmq.ZMQError):
            sent = cast("asyncio.Future[object]", self._socket.send(encode(command), zmq.NOBLOCK))
            if sent.done() and not sent.cancelled():
                sent.exception()  # the worker is gone, and its supervisor tells everyone

    async def _supervise(self, ready: asyncio.Future[None]) -> None:
        """Run one worker after another; back off while they die young."""
        num_fast_deaths = 0
        while True:
            began = asyncio.get_running_loop().time()
            error = await self._run_worker(ready)
            if isinstance(error, ModelNotServable) or not ready.done() or num_fast_deaths >= _MAX_FAST_DEATHS:
                self._state, self._detail = "failed", str(error)
                self._fail_all(error)
                if not ready.done():
                    ready.set_exception(error)
                return
            lived = asyncio.get_running_loop().time() - began
            num_fast_deaths = 0 if lived > 60 else num_fast_deaths + 1
            self._state, self._detail = "restarting", str(error)
            _log.error("%s", error)
            self._fail_all(error)
            await asyncio.sleep(_BACKOFF_SECONDS[min(num_fast_deaths, len(_BACKOFF_SECONDS)) - 1])

    async def _run_worker(self, ready: asyncio.Future[None]) -> EngineError:
        """One worker's life; returns why it ended."""
        self._num_starts += 1
        address = f"ipc://{self._directory.name}/{self._num_starts}"
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "loraplex.engines.native.worker", address, stdin=asyncio.subprocess.PIPE
        )
        reader = asyncio.create_task(self._read(ready))
        try:
            waiter = asyncio.create_task(process.wait())
            await asyncio.wait({reader, waiter}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                return reader.result()
            return EngineDied(f"the engine process ended with status {process.returncode}; it is being restarted")
        finally:
            reader.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()
            self._socket.close(linger=0)

    async def _read(self, ready: asyncio.Future[None]) -> EngineError:
        """Hand reports to whom they concern, until one says that the worker cannot start."""
        while True:
            report = decode_report(await self._socket.recv())
            match report:
                case Stepped(step, tokens, failed):
                    for token in tokens:
                        self._deliver(token.request_id, _Arrived(step, token))
                    for failure in failed:
                        self._deliver(failure.request_id, _error(failure.failure))
                case Reply(call):
                    if (answer := self._calls.get(call)) is not None and not answer.done():
                        answer.set_result(report)
                case Hello():
                    self._send(Configure(self._settings))
                case Loading(progress):
                    self._on_progress(progress)
                case Ready(info, eos_token_ids):
                    self._info = info
                    self.tokenizer.eos_token_ids = frozenset(eos_token_ids)
                    self._state, self._detail = "ready", ""
                    self._on_progress(Progress(stage="ready", fraction=1.0))
                    if not ready.done():
                        ready.set_result(None)
                case StartFailed(failure):
                    return _error(failure)

    def _deliver(self, request_id: str, arrived: _Arrived | EngineError) -> None:
        if (answers := self._answers.get(request_id)) is not None:
            answers.put_nowait(arrived)

    def _fail_all(self, error: EngineError) -> None:
        for answers in self._answers.values():
            answers.put_nowait(error)
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error)


def _error(failure: Failure) -> EngineError:
    return from_wire(failure.kind, failure.message, failure.param)


def _event(arrived: _Arrived, detokenizer: Detokenizer) -> TokenEvent:
    """A worker's token as the client sees it; the end token itself has no text."""
    token = arrived.token
    finish = token.finish_reason
    text = "" if finish == "stop" else detokenizer.feed(token.token_id)
    if finish is not None and not detokenizer.is_stopped:
        text += detokenizer.finish()
    return TokenEvent(
        request_id=token.request_id,
        token_ids=(token.token_id,),
        text=text,
        step=arrived.step,
        finish_reason="stop" if detokenizer.is_stopped else finish,
        num_cached_tokens=token.num_cached_tokens,
        logprobs=(token.logprobs,) if token.logprobs is not None else (),
    )
