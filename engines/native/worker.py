"""The engine's own process: takes commands, steps, reports. `__main__` runs it with a socket's address.

It ends when its standard input closes, so that it never outlives the process that started it.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

import zmq

from loraplex.config.settings import Settings
from loraplex.engines.errors import AdapterError, AdapterInvalid, EngineDied, EngineError, to_wire
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.loading import Machine, load_machine
from loraplex.engines.native.messages import (
    Command,
    Configure,
    Embed,
    End,
    Failed,
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
    Report,
    StartFailed,
    Stepped,
    Submit,
    Token,
    Unload,
    decode_command,
    encode,
    language,
)
from loraplex.engines.native.scheduler import Emission
from loraplex.engines.protocol import AdapterCard, Embedding, Progress

# How long to sleep for a command, in milliseconds: while adapters are read or grammars compiled; while requests wait.
_LOADING_MS = 2
_WAITING_MS = 20

_log = logging.getLogger("loraplex.engine")


class Worker:
    """One core behind one socket."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._inspected: SimpleQueue[Reply] = SimpleQueue()
        self._num_inspecting = 0

    def run(self) -> None:
        """Load what the first command says, then serve until killed."""
        self._send(Hello(language()))
        configure = decode_command(self._socket.recv())
        assert isinstance(configure, Configure)
        try:
            machine = _load(configure.settings, lambda progress: self._send(Loading(progress)))
        except EngineError as error:
            self._send(StartFailed(_failure(error)))
            return
        self._core = EngineCore(machine)
        gc.freeze()  # what is loaded stays, and no collection between steps need look at it again
        gc.enable()
        self._send(Ready(machine.info, sorted(machine.eos_token_ids)))
        wait_ms: int | None = None
        while True:
            self._take_commands(wait_ms)
            emissions = self._core.step()
            if emissions:
                self._send(stepped(self._core.scheduler.num_steps, emissions))
            wait_ms = self._patience()

    def _patience(self) -> int | None:
        """How long the loop may sleep for a command: not at all while something runs, for ever when idle."""
        if self._core.is_busy:
            return 0
        if self._core.is_preparing or self._num_inspecting:
            return _LOADING_MS
        return _WAITING_MS if self._core.has_work else None

    def _take_commands(self, wait_ms: int | None) -> None:
        if self._socket.poll(wait_ms):
            while self._socket.poll(0):
                self._obey(decode_command(self._socket.recv()))
        while not self._inspected.empty():
            self._num_inspecting -= 1
            self._send(self._inspected.get())

    def _obey(self, command: Command) -> None:
        core = self._core
        match command:
            case Submit(request):
                self._try(request.request_id, lambda: core.submit(request))
            case Embed(wanted):
                self._try(wanted.request_id, lambda: core.embed(wanted))
            case End(request_id, aborted):
                core.end(request_id, aborted=aborted)
            case Inspect(call, adapter):
                self._num_inspecting += 1
                core.adapters.inspect(adapter, lambda future: self._inspected.put(_inspection(call, future)))
            case Load(call, adapter):
                core.adapters.load(adapter, self._replier(call))
            case Pin(call, adapter, pinned):
                core.adapters.pin(adapter, pinned=pinned, done=self._replier(call))
            case Unload(call, adapter_id):
                try:
                    core.adapters.unload(adapter_id)
                    self._send(Reply(call))
                except AdapterError as error:
                    self._send(Reply(call, failure=_failure(error)))
            case GetResidency(call):
                self._send(Reply(call, residency=core.residency()))
            case GetStats(call):
                self._send(Reply(call, stats=core.stats()))

    def _try(self, request_id: str, submit: Callable[[], None]) -> None:
        try:
            submit()
        except EngineError as error:
            failed = Failed(request_id, _failure(error))
            self._send(Stepped(self._core.scheduler.num_steps, [], [failed]))

    def _replier(self, call: int) -> Callable[[AdapterError | None], None]:
        return lambda error: self._send(Reply(call, failure=_failure(error) if error else None))

    def _send(self, report: Report) -> None:
        self._socket.send(encode(report))


def _load(settings: Settings, on_progress: Callable[[Progress], None]) -> Machine:
    """Raises ModelNotServable where that lies in the settings or the model; EngineDied for all else, as another try
    may go well."""
    try:
        return load_machine(settings, on_progress)
    except EngineError:
        raise
    except Exception as error:
        _log.exception("the model was not loaded")
        raise EngineDied(f"the engine could not load the model: {type(error).__name__}: {error}") from error


def _failure(error: EngineError) -> Failure:
    return Failure(*to_wire(error))


def _inspection(call: int, future: Future[AdapterCard]) -> Reply:
    error = future.exception()
    if error is None:
        return Reply(call, card=future.result())
    known = error if isinstance(error, EngineError) else AdapterInvalid(f"cannot be read: {error!r}")
    return Reply(call, failure=_failure(known))


def stepped(step: int, emissions: list[Emission]) -> Stepped:
    """The message that tells what step number `step` gave."""
    tokens = [
        Token(
            e.sequence.request_id,
            s.token_id,
            e.finish_reason,
            e.sequence.num_cached_tokens,
            e.sequence.queue_seconds or 0.0,
            s.logprobs,
            e.prompt_logprobs,
        )
        for e in emissions
        if (s := e.sampled) is not None
    ]
    failed = [Failed(e.sequence.request_id, _failure(e.error)) for e in emissions if e.error is not None]
    embeddings = [
        Embedding(request_id=e.sequence.request_id, values=e.embedding, num_cached_tokens=e.sequence.num_cached_tokens)
        for e in emissions
        if e.embedding is not None
    ]
    return Stepped(step, tokens, failed, embeddings)


def _exit_with_parent() -> None:
    os.read(0, 1)  # not through sys.stdin: its lock would be held when the interpreter ends, which aborts it
    os._exit(0)


def main() -> None:
    """Serve on the socket whose address is the only argument."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s engine %(levelname)s %(message)s")
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(sys.argv[1])
    try:
        Worker(socket).run()
    except Exception as error:
        _log.exception("the engine process ends")
        raise SystemExit(1) from error  # which shows no second traceback
    finally:
        socket.close(linger=1000)
        context.term()
