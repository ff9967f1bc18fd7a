"""The native engine as the gateway sees it: starts the worker process, speaks to it, restarts it when it dies.

Tokens become text here, off the worker's step. torch is imported in the worker only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import msgspec
import zmq.asyncio

from loraplex.config.settings import Settings
from loraplex.engines.adapters.tokenizers import AdapterTokenizers
from loraplex.engines.ends import all_ends, named_ends, with_own_ends
from loraplex.engines.errors import AdapterError, EngineError, EngineUnavailable, ModelNotServable
from loraplex.engines.events import Events, Mailbox
from loraplex.engines.native.answer import Answer
from loraplex.engines.native.detokenizer import Detokenizer
from loraplex.engines.native.messages import (
    Command,
    Embed,
    End,
    GetResidency,
    GetStats,
    Inspect,
    Load,
    Pin,
    Reply,
    Submit,
    Unload,
)
from loraplex.engines.native.process import WorkerProcess
from loraplex.engines.protocol import (
    Adapter,
    AdapterCard,
    AdapterResidency,
    Embedding,
    EmbedRequest,
    EngineInfo,
    GenerateRequest,
    Health,
    HealthState,
    Progress,
)
from loraplex.engines.stats import EngineStats
from loraplex.engines.tokenizer import HubTokenizer, TemplatedTokenizer

_BACKOFF_SECONDS = (0.0, 0.0, 0.25, 0.5, 1.0, 2.0)  # by how many workers in a row died young
_YOUNG_SECONDS = 60.0
_MAX_STILLBORN = 6  # workers in a row that were never ready; then the engine has failed

_log = logging.getLogger("loraplex.engine")


class NativeEngine:
    """Implements the engine protocol over a worker process; an older one may be finishing its streams beside it."""

    tokenizer: HubTokenizer
    _tokenizers: AdapterTokenizers | None = None

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state: HealthState = "starting"
        self._detail = ""
        self._num_started = 0
        self._num_restarts = 0
        self._num_stillborn = 0
        self._num_fast_deaths = 0
        self._reloading = asyncio.Lock()  # or several models at once would be loaded beside the one in use
        self._known: dict[str, Adapter] = {}
        self._pinned: set[str] = set()
        self._on_progress: Callable[[Progress], None] = lambda progress: None
        self._workers: dict[WorkerProcess, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, on_progress: Callable[[Progress], None]) -> EngineInfo:
        model = self._settings.model
        self._context = zmq.asyncio.Context()
        self._directory = tempfile.TemporaryDirectory(prefix="loraplex-")
        self._on_progress = on_progress
        on_progress(Progress(stage="starting the engine process", fraction=0.0))
        self._worker = self._begin_worker()
        try:
            self.tokenizer = await asyncio.to_thread(HubTokenizer, model.directory, may_stand_in=model.random_weights)
            await self._take_up(self._worker)
        except EngineError as error:
            self._state, self._detail = "failed", str(error)
            raise
        on_progress(Progress(stage="ready", fraction=1.0))
        return self.info()

    async def tokenizer_of(self, adapter: Adapter | None) -> TemplatedTokenizer:
        self._require_ready()
        if adapter is None:
            return self.tokenizer
        if self._tokenizers is None:
            self._tokenizers = AdapterTokenizers(self.tokenizer, self._info.vocab_size)
        return await self._tokenizers.of(adapter)

    def info(self) -> EngineInfo:
        return self._info

    def generate(self, request: GenerateRequest) -> Events:
        return Events(partial(self._answering, request))

    @asynccontextmanager
    async def _answering(self, request: GenerateRequest, mailbox: Mailbox) -> AsyncIterator[None]:
        self._require_ready()
        for part in request.parts:
            self._known[part.adapter.id] = part.adapter
        tokenizer = await self.tokenizer_of(request.adapter)
        self._require_ready()  # still: while a tokenizer was read the worker may have died
        request = with_own_ends(request, tokenizer.own_ends)
        worker, sampling, eos = self._worker, request.sampling, self.tokenizer.eos_token_ids
        text = tokenizer.stream(skip_special_tokens=sampling.skip_special_tokens)
        detokenizer = Detokenizer(
            text, sampling.stop, includes_stop=sampling.includes_stop, min_tokens=sampling.min_tokens
        )
        ends, named = all_ends(sampling, eos), named_ends(sampling, eos)
        stop = partial(worker.send, End(request.request_id, aborted=False))
        answer = Answer(mailbox, detokenizer, ends, stop, includes_ends=sampling.includes_stop, named_ends=named)
        worker.answers[request.request_id] = answer
        try:
            worker.send(Submit(request))
            yield
        finally:
            del worker.answers[request.request_id]
            if not answer.is_over:
                worker.send(End(request.request_id, aborted=True))

    async def embed(self, request: EmbedRequest) -> Embedding:
        self._require_ready()
        worker = self._worker
        for part in request.parts:
            self._known[part.adapter.id] = part.adapter
        embedding: asyncio.Future[Embedding] = asyncio.get_running_loop().create_future()
        worker.embeddings[request.request_id] = embedding
        try:
            worker.send(Embed(request))
            return await embedding
        except asyncio.CancelledError:
            worker.send(End(request.request_id, aborted=True))
            raise
        finally:
            del worker.embeddings[request.request_id]

    async def inspect(self, adapter: Adapter) -> AdapterCard:
        await self.tokenizer_of(adapter)
        reply = await self._call(lambda call: Inspect(call, adapter))
        assert reply.card is not None
        return reply.card

    async def load(self, adapter: Adapter) -> None:
        self._known[adapter.id] = adapter
        await self._call(lambda call: Load(call, adapter))

    async def unload(self, adapter_id: str) -> None:
        await self._call(lambda call: Unload(call, adapter_id))
        self._pinned.discard(adapter_id)
        self._known.pop(adapter_id, None)

    async def pin(self, adapter: Adapter, *, pinned: bool) -> None:
        if pinned:
            self._known[adapter.id] = adapter
        await self._call(lambda call: Pin(call, adapter, pinned))
        (self._pinned.add if pinned else self._pinned.discard)(adapter.id)

    async def residency(self) -> list[AdapterResidency]:
        return (await self._call(GetResidency)).residency or []

    async def stats(self) -> EngineStats:
        reply = await self._call(GetStats)
        assert reply.stats is not None
        return msgspec.structs.replace(reply.stats, num_restarts=self._num_restarts)

    def health(self) -> Health:
        return Health(state=self._state, detail=self._detail)

    async def reload(self) -> EngineInfo:
        async with self._reloading:
            self._require_ready()
            worker = self._begin_worker(self._worker.residents)
            try:
                await self._take_up(worker)
            except asyncio.CancelledError:
                if worker is not self._worker:
                    await self._end(worker)
                raise
            return self.info()

    async def close(self, drain_seconds: float = 0.0) -> None:
        if self._state in ("ready", "restarting"):
            self._state = "draining"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                await asyncio.gather(*(_drained(worker) for worker in self._workers))
        for task in [*self._tasks, *self._workers.values()]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._workers.values(), return_exceptions=True)
        if self._tokenizers is not None:
            await self._tokenizers.close()
        if self._num_started:
            self._context.destroy(linger=0)
            self._directory.cleanup()

    def _require_ready(self) -> None:
        if self._state != "ready":
            raise EngineUnavailable(f"the engine is {self._state}; try again shortly")

    async def _call(self, command: Callable[[int], Command]) -> Reply:
        self._require_ready()
        return await self._worker.call(command)

    def _begin_worker(self, residents: Sequence[AdapterResidency] = ()) -> WorkerProcess:
        """A new process, which will have to take over its predecessor's adapters."""
        self._num_started += 1
        address = f"ipc://{self._directory.name}/{self._num_started}"
        worker = WorkerProcess(self._settings, self._context, address, self._on_progress, residents)
        self._workers[worker] = asyncio.create_task(self._watch(worker))
        return worker

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, worker: WorkerProcess) -> None:
        """See a worker through its life; where it dies while it is the one in use, another follows."""
        began = asyncio.get_running_loop().time()
        try:
            error = await worker.run()
        finally:
            del self._workers[worker]
        if worker is not self._worker or self._state not in ("ready", "restarting"):
            return
        _log.error("%s", error)
        self._num_stillborn = 0 if worker.was_ready else self._num_stillborn + 1
        if isinstance(error, ModelNotServable) or self._num_stillborn >= _MAX_STILLBORN:
            self._state, self._detail = "failed", str(error)
            return
        self._state, self._detail = "restarting", str(error)
        is_young = asyncio.get_running_loop().time() - began < _YOUNG_SECONDS
        self._num_fast_deaths = self._num_fast_deaths + 1 if is_young else 0
        self._keep(asyncio.create_task(self._restart(worker.residents)))

    async def _restart(self, residents: Sequence[AdapterResidency]) -> None:
        await asyncio.sleep(_BACKOFF_SECONDS[min(self._num_fast_deaths, len(_BACKOFF_SECONDS) - 1)])
        self._num_restarts += 1
        self._worker = self._begin_worker(residents)
        with contextlib.suppress(EngineError):  # its own watch sees to that
            await self._take_up(self._worker)

    async def _take_up(self, worker: WorkerProcess) -> None:
        """Use a worker as soon as it is ready, whichever it replaces. Raises the error that it ended with instead."""
        ready = await asyncio.shield(worker.ready)
        if self._state == "draining":
            raise EngineUnavailable("the engine is stopping")
        replaced, self._worker, self._info = self._worker, worker, ready.info
        if replaced is not worker:
            self._keep(asyncio.create_task(self._retire(replaced)))
        self.tokenizer.eos_token_ids = frozenset(ready.eos_token_ids)
        self._state, self._detail = "ready", ""
        self._keep(asyncio.create_task(self._warm(worker)))

    async def _warm(self, worker: WorkerProcess) -> None:
        """Bring the predecessor's adapters to the device, the pinned ones first."""
        resident = [self._known[found.adapter_id] for found in worker.inherited if found.adapter_id in self._known]
        for adapter in sorted(resident, key=lambda adapter: adapter.id not in self._pinned):
            try:
                await worker.call(_restore(adapter, is_pinned=adapter.id in self._pinned))
            except AdapterError as error:
                _log.warning("adapter %s was on the device and could not be restored: %s", adapter.name, error)
            except EngineError:
                return

    async def _retire(self, worker: WorkerProcess) -> None:
        """Let a replaced worker finish its streams, then end it."""
        await _drained(worker)
        await self._end(worker)

    async def _end(self, worker: WorkerProcess) -> None:
        if (watch := self._workers.get(worker)) is not None:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)


def _restore(adapter: Adapter, *, is_pinned: bool) -> Callable[[int], Command]:
    return lambda call: Pin(call, adapter, pinned=True) if is_pinned else Load(call, adapter)


async def _drained(worker: WorkerProcess) -> None:
    while worker.is_busy:
        await asyncio.sleep(0.02)
