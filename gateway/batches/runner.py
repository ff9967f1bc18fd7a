"""Works off batches: claims them, answers their lines, writes their files.

What is done is in the database before anything else happens, so that this may end at any moment, by SIGKILL too, and
whoever goes on finds every answer that was given and gives only those that are missing.
"""

import asyncio
import contextlib
import logging
import time

from sqlalchemy.exc import SQLAlchemyError

from loraplex.config.settings import BatchSettings
from loraplex.gateway.batches.answering import Answerer, unanswered
from loraplex.gateway.batches.lines import InputInvalid, Line, count_checked, requests
from loraplex.gateway.batches.records import Answer, Batch, BatchProblem, BatchRecords, LeaseLost, Status
from loraplex.gateway.files.store import FileStore, StoredFile

_log = logging.getLogger("loraplex.gateway")

_SWEEP_SECONDS = 3600.0
_FIRST_PAUSE_SECONDS = 0.1  # between two tries to write down an answer
_LONGEST_PAUSE_SECONDS = 5.0
_MAX_DEATHS = 3  # of gateways in a row, before what they had begun is told so: it may be what kills them
_DIED = ("gateway_died", f"The gateway died {_MAX_DEATHS} times while it worked on this.")
_EXPIRED = ("batch_expired", "The batch's completion window ended before this request was answered.")
_CANCELLED = ("batch_cancelled", "The batch was cancelled before this request was answered.")


class BatchRunner:
    """The batches that this gateway works on."""

    def __init__(self, records: BatchRecords, files: FileStore, settings: BatchSettings, max_line_bytes: int) -> None:
        self._records = records
        self._files = files
        self._settings = settings
        self._max_line_bytes = max_line_bytes
        self._running: dict[str, asyncio.Task[None]] = {}
        self._cancelled: dict[str, asyncio.Event] = {}
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, answerer: Answerer) -> None:
        """Begin, or go on with what an earlier process left."""
        if self._settings.max_running:
            self._task = asyncio.create_task(self._supervise(answerer))

    def notice(self) -> None:
        """A batch was made or cancelled: see to it now rather than at the next look."""
        self._news.set()

    async def close(self) -> None:
        """Let go of everything; what was under way is done again by whoever goes on."""
        tasks = [task for task in (self._task, *self._running.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _supervise(self, answerer: Answerer) -> None:
        swept_at = 0.0
        while True:
            self._news.clear()
            try:
                if time.monotonic() - swept_at > _SWEEP_SECONDS:
                    swept_at = time.monotonic()
                    await self._files.sweep()
                await self._renew()
                for batch in await self._records.claim(self._num_free(), self._settings.lease_seconds):
                    self._begin(batch, answerer)
            except Exception:  # noqa: BLE001  an edge of the process: it is logged, and tried again
                _log.exception("batches wait: the database or the disk is in trouble")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.lease_seconds / 3):  # Python 3.11's wait_for loses a cancel
                    await self._news.wait()

    def _num_free(self) -> int:
        return self._settings.max_running - len(self._running)

    def _begin(self, batch: Batch, answerer: Answerer) -> None:
        self._cancelled[batch.id] = asyncio.Event()
        self._running[batch.id] = asyncio.create_task(self._work(batch, answerer))

    async def _renew(self) -> None:
        for batch_id, task in list(self._running.items()):
            try:
                batch = await self._records.renew(batch_id, self._settings.lease_seconds)
            except LeaseLost:
                task.cancel()
                continue
            if batch.status == "cancelling":
                self._cancelled[batch_id].set()

    async def _work(self, batch: Batch, answerer: Answerer) -> None:
        """From whatever state it is in to its end."""
        try:
            if batch.status == "cancelling":
                self._cancelled[batch.id].set()
            if batch.status == "validating":
                batch = await self._check(batch)
            if batch.status == "in_progress":
                await self._answer_in_time(batch, answerer)
                batch = await self._records.move(batch, "finalizing")
            if batch.status in ("finalizing", "cancelling"):
                await self._finish(batch)
        except LeaseLost:
            _log.info("batch %s is another gateway's, or gone", batch.id)
        except asyncio.CancelledError:
            await self._records.release(batch.id)
            raise
        except Exception:  # noqa: BLE001  an edge as well
            _log.exception("batch %s is taken up again when its lease has run out", batch.id)
        finally:
            del self._running[batch.id], self._cancelled[batch.id]
            self._news.set()

    async def _check(self, batch: Batch) -> Batch:
        if batch.num_deaths >= _MAX_DEATHS:
            return await self._records.move(batch, "failed", errors=[BatchProblem(*_DIED)])
        path = self._files.path(batch.tenant_id, batch.input_file_id)
        problems = [BatchProblem("file_not_found", "The input file is gone.")]
        try:
            total = await asyncio.to_thread(count_checked, path, batch.endpoint, self._max_line_bytes)
        except InputInvalid as error:
            problems = error.problems
        except FileNotFoundError:
            pass
        else:
            return await self._records.move(batch, "in_progress", num_total=total)
        return await self._records.move(batch, "failed", errors=problems)

    async def _answer_in_time(self, batch: Batch, answerer: Answerer) -> None:
        """Until all lines are answered, the batch is cancelled, or its time is over."""
        work = asyncio.create_task(self._answer_all(batch, answerer))
        cancelled = asyncio.create_task(self._cancelled[batch.id].wait())
        try:
            left = max(batch.expires_at - time.time(), 0)
            await asyncio.wait({work, cancelled}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, cancelled):
                task.cancel()
            await asyncio.gather(work, cancelled, return_exceptions=True)

    async def _answer_all(self, batch: Batch, answerer: Answerer) -> None:
        """After a gateway's death, as many lines as it may have been at go one by one, so that a killer is found."""
        answered = await self._records.answered(batch.id)
        width = await answerer.width(batch, self._settings.max_requests)
        room = asyncio.Semaphore(width)
        is_killer, num_suspects = batch.num_deaths >= _MAX_DEATHS, width if batch.num_deaths else 0

        async def answer(line: Line) -> None:
            try:
                await self._record(batch, await answerer.answer(batch, line))
            finally:
                room.release()

        async with asyncio.TaskGroup() as group:
            async for line in requests(self._files.path(batch.tenant_id, batch.input_file_id)):
                if line.number in answered:
                    continue
                if is_killer:
                    is_killer = False
                    await self._record(batch, unanswered(batch, line, *_DIED))
                    continue
                await room.acquire()
                task = group.create_task(answer(line))
                if num_suspects:
                    num_suspects -= 1
                    await asyncio.wait({task})

    async def _record(self, batch: Batch, answer: Answer) -> None:
        """As soon as the database takes it: the answer is paid for, and raising would cut off all other lines."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return await self._records.record(batch.id, answer)
            except (SQLAlchemyError, OSError) as error:
                reason = getattr(error, "orig", None) or error  # without the statement, which has the answer in it
                _log.warning("batch %s: an answer waits for the database: %s", batch.id, reason)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _finish(self, batch: Batch) -> None:
        """Every line that has no answer is told why; then the files are written, and the batch is over."""
        status: Status = "cancelled" if batch.status == "cancelling" else "completed"
        answered = await self._records.answered(batch.id)
        if len(answered) < batch.num_total:
            code, message = _CANCELLED if status == "cancelled" else _EXPIRED
            status = "cancelled" if status == "cancelled" else "expired"
            async for line in requests(self._files.path(batch.tenant_id, batch.input_file_id)):
                if line.number not in answered:
                    await self._records.record(batch.id, unanswered(batch, line, code, message))
        output = await self._write(batch, "output", is_error=False)
        errors = await self._write(batch, "error", is_error=True)
        await self._records.finish(batch, status, output, errors)

    async def _write(self, batch: Batch, kind: str, *, is_error: bool) -> StoredFile | None:
        """One file of answers, in the order of the input; None where there is nothing to write."""
        draft = await self._files.open_draft(batch.tenant_id, is_bounded=False)
        try:
            async for _, text in self._records.texts(batch.id, is_error=is_error):
                await draft.write(text.encode() + b"\n")
            if not draft.num_bytes:
                return None
            expires_at = None if batch.output_seconds is None else time.time() + batch.output_seconds
            return await self._files.seal(
                draft, batch.tenant_id, f"{batch.id}_{kind}.jsonl", "batch_output", expires_at
            )
        finally:
            await draft.close()
