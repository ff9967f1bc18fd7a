"""The one place where a request is admitted, counted while it runs, and settled when it is over, however it ends."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import msgspec

from loraplex.auth.caller import Caller
from loraplex.auth.errors import InvalidApiKey, LimitReached, QuotaSpent
from loraplex.auth.limits.admission import Admission, Reservation
from loraplex.auth.limits.charges import Standing
from loraplex.auth.metering import ABORTED, COMPLETED, INTERRUPTED, RUNNING, Books, Demand, Entry, UsageRecord
from loraplex.auth.tenants import Tenants
from loraplex.engines.protocol import GenerateRequest, TokenEvent
from loraplex.gateway.errors import ClientLeft, MalformedRequest
from loraplex.gateway.middleware import Headers


class Accounts:
    """Opens a meter for each request that uses the engine."""

    def __init__(self, admission: Admission, books: Books, tenants: Tenants) -> None:
        self._admission = admission
        self._books = books
        self._tenants = tenants
        self._open: set[Meter] = set()
        tenants.on_change(self._end_requests_of_dead_keys)

    async def _end_requests_of_dead_keys(self) -> None:
        """Who may do what has changed: requests under keys that are revoked or gone end with InvalidApiKey."""
        in_use = {meter.key_id for meter in self._open}
        if not in_use:
            return
        dead = in_use - await self._tenants.living_keys(in_use)
        for meter in list(self._open):
            if meter.key_id in dead:
                meter.end(InvalidApiKey("The API key was revoked while the request was running."))

    async def open(self, caller: Caller, demand: Demand, tell: Callable[[Callable[[], Headers]], None]) -> "Meter":
        """Whoever opens a meter settles it. `tell` is given what makes the headers about limits, admitted or refused.

        Raises LimitReached, LimitsUnavailable or KeysUnavailable.
        """
        with self._telling(caller, tell):
            reservation = await self._admission.reserve(caller, demand)
        record = UsageRecord(
            request_id=demand.request_id,
            trace_id=demand.trace_id,
            route=demand.route,
            tenant_id=caller.tenant_id,
            key_id=caller.key_id,
            model=demand.model,
            adapter_id=demand.adapter_id,
            num_prompt_tokens=demand.num_prompt_tokens,
            began_at=time.time(),
        )
        try:
            entry = self._books.begin(record)
        except BaseException:
            reservation.settle(0, 0)
            raise
        meter = Meter(
            record,
            entry,
            self._books,
            self._admission,
            reservation,
            self._open.discard,
            is_background=caller.is_background,
        )
        self._open.add(meter)
        if caller.as_of != self._tenants.num_changes:  # it was let in before a change, which missed this meter
            try:
                await self._end_requests_of_dead_keys()
            except BaseException as error:
                meter.settle(error)
                raise
        tell(meter.headers)
        return meter

    @asynccontextmanager
    async def preparing(self, caller: Caller, tell: Callable[[Callable[[], Headers]], None]) -> AsyncIterator[None]:
        """While this lasts the caller's limits hold one request more, of which nothing is known but that it is asked.

        Raises LimitReached or LimitsUnavailable; `tell` as for `open`.
        """
        with self._telling(caller, tell):
            held = await self._admission.hold(caller)
        try:
            yield
        finally:
            held.undo()

    @contextmanager
    def _telling(self, caller: Caller, tell: Callable[[Callable[[], Headers]], None]) -> Iterator[None]:
        try:
            yield
        except LimitReached:
            tell(lambda: _told(self._admission.standings(caller)))
            raise


class Meter:
    """What one request uses. `on_settled` is called with it once it is over.

    One in the background has no client that sees its tokens as they come: whoever gets its answer gets it whole. So one
    that is cut off, by whatever, has given nobody anything and costs nothing; most are asked again.
    """

    __slots__ = (
        "_admission", "_at_end", "_books", "_end", "_entry", "_first_token_at", "_is_background", "_is_settled",
        "_num_covered", "_on_settled", "_outcome", "_record", "_reservation", "_workers", "num_cached_tokens",
        "num_completion_tokens", "refusal",
    )  # fmt: skip

    def __init__(
        self,
        record: UsageRecord,
        entry: Entry,
        books: Books,
        admission: Admission,
        reservation: Reservation,
        on_settled: "Callable[[Meter], None]",
        *,
        is_background: bool,
    ) -> None:
        self._on_settled = on_settled
        self._workers: set[asyncio.Task[Any]] = set()
        self._end: InvalidApiKey | None = None
        self._record = record
        self._entry = entry
        self._books = books
        self._admission = admission
        self._reservation = reservation
        self._num_covered = _num_covered(reservation)
        self.num_completion_tokens = 0
        self.num_cached_tokens = 0
        self._first_token_at: float | None = None
        self._is_settled = False
        self._is_background = is_background
        self._outcome = RUNNING
        self._at_end: list[Callable[[str], None]] = []
        self.refusal: QuotaSpent | None = None  # why the answer was cut short, if it was

    @property
    def key_id(self) -> str:
        return self._record.key_id

    @property
    def num_prompt_tokens(self) -> int:
        return self._record.num_prompt_tokens

    def end(self, error: InvalidApiKey) -> None:
        """Whoever works for this request gets the error instead of the next event, at once."""
        self._end = error
        for task in self._workers:
            task.cancel()

    @property
    def is_complete(self) -> bool:
        """Whether it ended well: not cut short, not left, not failed."""
        return self._outcome == COMPLETED

    def at_end(self, callback: Callable[[str], None]) -> None:
        """Called with the outcome, in the ledger's words, once the request is settled."""
        self._at_end.append(callback)

    @contextmanager
    def working(self) -> Iterator[None]:
        """The current task does the request's work, which `end` breaks off. Raises the error of `end`."""
        task = asyncio.current_task()
        assert task is not None, "work is done in a task"
        self._workers.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if self._end is None:
                raise
            task.uncancel()  # it was `end` that cancelled it
        finally:
            self._workers.discard(task)
        if self._end is not None:
            raise self._end

    def takes(self, event: TokenEvent) -> bool:
        """Count the event's tokens, before anyone sees them; False where more must be reserved first."""
        num_tokens = self.num_completion_tokens + len(event.token_ids)
        if num_tokens > self._num_covered or self._end is not None:
            return False
        self.num_completion_tokens = num_tokens
        if self._first_token_at is None:
            self._first_token_at = time.time()
        if event.num_cached_tokens > self.num_cached_tokens:
            self.num_cached_tokens = event.num_cached_tokens
        if not self._is_background:  # what a kill leaves without a token costs nothing
            self._entry.progress(num_tokens, self.num_cached_tokens)
        return True

    async def reserves(self, event: TokenEvent) -> bool:
        """The same, with more reserved; False where the budget is spent, and `refusal` says why.

        Raises the error of `end`.
        """
        while not self.takes(event):
            if self._end is not None:
                raise self._end
            try:
                await self._reservation.extend()
            except QuotaSpent as error:
                self.refusal = error
                return False
            self._num_covered = _num_covered(self._reservation)
        return True

    def saw_prompts(self, num_cached_tokens: int) -> None:
        """All of a request's prompts were computed, or found in the cache, and nothing is generated for them."""
        self.num_cached_tokens = num_cached_tokens

    def forget_answer(self) -> None:
        """What was generated is thrown away unseen, for the client is to ask again: it costs nothing."""
        self.num_completion_tokens = self.num_cached_tokens = 0
        self._first_token_at = None

    def settle(self, error: BaseException | None = None) -> None:
        """The request is over, with this error or well. Settling again changes nothing.

        What failed before its first token costs nothing, its prompt neither.
        """
        if self._is_settled:
            return
        self._is_settled = True
        self._on_settled(self)
        outcome = _outcome(error or self.refusal)
        if outcome == ABORTED and self._is_background:
            outcome = INTERRUPTED
            self.forget_answer()
        self._outcome = outcome
        has_failed = self._first_token_at is None and outcome not in (COMPLETED, ABORTED)
        num_prompt = 0 if has_failed else self._record.num_prompt_tokens
        try:
            self._books.settle(
                msgspec.structs.replace(
                    self._record,
                    num_prompt_tokens=num_prompt,
                    num_cached_tokens=self.num_cached_tokens,
                    num_completion_tokens=self.num_completion_tokens,
                    first_token_at=self._first_token_at,
                    ended_at=time.time(),
                    outcome=outcome,
                )
            )
        finally:  # after it is written down, and whatever becomes of that: a reservation never stays
            self._reservation.settle(num_prompt, self.num_completion_tokens)
        if outcome == COMPLETED and self.num_completion_tokens:
            self._admission.learn(self._record.key_id, self._record.model, self.num_completion_tokens)
        for callback in self._at_end:
            callback(outcome)

    def headers(self) -> Headers:
        """`x-ratelimit-*` of the limits that hold, and why the answer was cut short, if it was by now."""
        found = _told(self._reservation.standings())
        if self.refusal is not None:
            found.append((b"x-loraplex-cut-short", b"insufficient_quota"))
        return found


def _num_covered(reservation: Reservation) -> float:
    """How many tokens may be given out without reserving more."""
    return math.inf if reservation.is_whole else reservation.num_output_tokens


def fitted(caller: Caller, choices: Sequence[GenerateRequest], *, is_open_ended: bool) -> list[GenerateRequest]:
    """The requests as the caller's limits let them be: its weight, priority, cache and longest answer.

    Raises MalformedRequest where the client itself asked for a longer one.
    """
    policy = caller.policy
    longest = max(choice.sampling.max_tokens for choice in choices)
    cap = policy.max_tokens or longest
    if longest > cap and not is_open_ended:
        raise MalformedRequest(f"This key may ask for at most {cap} tokens; {longest} were asked for.", "max_tokens")
    plain = (policy.weight, policy.priority, policy.shares_prefixes, caller.is_background) == (1.0, 0, False, False)
    if longest <= cap and plain:
        return list(choices)
    return [
        msgspec.structs.replace(
            choice,
            weight=policy.weight,
            priority=policy.priority + choice.priority,
            is_background=caller.is_background,
            shares_prefixes=policy.shares_prefixes,
            sampling=msgspec.structs.replace(choice.sampling, max_tokens=min(choice.sampling.max_tokens, cap)),
        )
        for choice in choices
    ]


def _told(standings: Mapping[str, Standing]) -> Headers:
    """`x-ratelimit-*` for "requests" and "tokens"."""
    found = []
    for unit, (limit, remaining, reset_seconds) in standings.items():
        found += [
            (f"x-ratelimit-limit-{unit}".encode(), b"%d" % limit),
            (f"x-ratelimit-remaining-{unit}".encode(), b"%d" % remaining),
            (f"x-ratelimit-reset-{unit}".encode(), _duration(reset_seconds).encode()),
        ]
    return found


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return COMPLETED
    if isinstance(error, ClientLeft | asyncio.CancelledError | GeneratorExit):
        return ABORTED
    return type(error).__name__


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 1s, 6m0s."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    whole = math.ceil(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, seconds_left = divmod(rest, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{seconds_left}s"
