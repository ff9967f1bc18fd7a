"""Limits counted in this process: each take is one synchronous stretch, so it is atomic on the event loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import msgspec

from loraplex.auth.limits.charges import RATE_SECONDS, Charge, Standing, refusal
from loraplex.auth.metering import Books

_SWEEP_EVERY = 4096


class _Budget(msgspec.Struct):
    """`spent` was used for good; `held` is reserved by requests that run, and comes back unless they use it."""

    spent: int
    held: int
    until: float


class MemoryStore:
    """Implements `Store`.

    A rate is a GCRA: one number, the time at which all that was taken will have refilled. A budget begins with what
    the books say was spent, so that a restart forgets nothing.
    """

    is_away = False

    def __init__(self, books: Books, clock: Callable[[], float] = time.time) -> None:
        self._books = books
        self._clock = clock
        self._rates: dict[str, float] = {}
        self._slots: dict[str, int] = {}
        self._budgets: dict[str, _Budget] = {}
        self._num_takes = 0

    def now(self) -> float:
        return self._clock()

    async def take(self, wanted: list[Charge], *, may_owe: bool = False) -> None:
        for charge in wanted:
            if charge.family == "budget" and charge.bucket not in self._budgets:
                spent = await self._books.spent(charge.tenant_id, charge.key_id, charge.since)
                self._budgets.setdefault(charge.bucket, _Budget(spent, 0, charge.until))
        now = self._clock()
        for charge in wanted:
            wait = 0.0 if may_owe and charge.family == "rate" else self._wait(charge, now)
            if wait:
                raise refusal(charge, wait, now)
        for charge in wanted:
            self._add(charge, charge.amount, now)
        self._num_takes += 1
        if self._num_takes % _SWEEP_EVERY == 0:
            self._sweep(now)

    def settle(self, charge: Charge, used: int) -> None:
        if charge.family == "budget":
            if budget := self._budgets.get(charge.bucket):  # none where its period ended long ago
                budget.held -= charge.amount
                budget.spent += used
        else:
            self._add(charge, used - charge.amount, self._clock())

    def standing(self, charge: Charge) -> Standing:
        owed = max(self._rates.get(charge.bucket, 0.0) - self._clock(), 0.0)  # seconds
        return Standing(charge.limit, max(int(charge.limit * (1 - owed / RATE_SECONDS)), 0), owed)

    async def correct(self, tenant_id: str, key_id: str | None) -> None:
        """Nothing is counted that a process before this one held."""

    async def close(self) -> None: ...

    def _wait(self, charge: Charge, now: float) -> float:
        """Seconds until there is room, 0 where there is."""
        if charge.family == "slots":
            return 0.0 if self._slots.get(charge.bucket, 0) + charge.amount <= charge.limit else 1.0
        if charge.family == "budget":
            budget = self._budgets[charge.bucket]
            if budget.spent + charge.amount > charge.limit:
                return math.inf
            return 0.0 if budget.spent + budget.held + charge.amount <= charge.limit else 1.0
        if charge.amount > charge.limit:
            return math.inf
        full_at = max(self._rates.get(charge.bucket, 0.0), now) + _seconds(charge, charge.amount)
        late = full_at - now - RATE_SECONDS
        return late if late > 1e-6 else 0.0  # times of 1e9 seconds have about 1e-7 of error

    def _add(self, charge: Charge, amount: int, now: float) -> None:
        if charge.family == "slots":
            self._slots[charge.bucket] = self._slots.get(charge.bucket, 0) + amount
        elif charge.family == "budget":
            self._budgets[charge.bucket].held += amount
        else:
            begin = self._rates.get(charge.bucket, 0.0)
            self._rates[charge.bucket] = (max(begin, now) if amount > 0 else begin) + _seconds(charge, amount)

    def _sweep(self, now: float) -> None:
        """Forget what is as good as new."""
        self._rates = {bucket: full_at for bucket, full_at in self._rates.items() if full_at > now}
        self._slots = {bucket: used for bucket, used in self._slots.items() if used}
        self._budgets = {bucket: budget for bucket, budget in self._budgets.items() if budget.until > now - 86400}


def _seconds(charge: Charge, amount: int) -> float:
    """How long a rate takes to refill so much."""
    return amount * RATE_SECONDS / charge.limit
