"""Holds every request to the limits of its tenant and its key: reserve first, settle however it ends.

A reservation is all or nothing over every limit. It takes the prompt's tokens and all that the answer may have; where
the client named no limit it takes what answers usually have, and more while the answer grows. What was not used comes
back at settlement. Tokens are handed out only when they are reserved, so a budget is never overshot.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial

from loraplex.auth.caller import Caller
from loraplex.auth.errors import QuotaSpent
from loraplex.auth.limits.charges import Charge, Standing, charges, more_output
from loraplex.auth.limits.estimates import Estimates
from loraplex.auth.limits.stores import Store, Stores
from loraplex.auth.metering import Demand


class Reservation:
    """What one request holds of its limits: each charge in the store that it was taken from."""

    def __init__(
        self, stores: Stores, caller: Caller, demand: Demand, output: int, taken: list[tuple[Store, Charge]]
    ) -> None:
        self._stores = stores
        self._caller = caller
        self._demand = demand
        self._taken = taken
        self._is_settled = False
        self.num_output_tokens = output

    @property
    def is_whole(self) -> bool:
        """Whether all that the answer may have is reserved."""
        return self.num_output_tokens >= self._demand.max_completion_tokens

    async def extend(self) -> None:
        """Reserve as much again for an answer that goes on, or less where less is left, down to a single token.

        Raises QuotaSpent where nothing is; a rate per minute cuts no answer short, it delays the next request.
        Raises LimitsUnavailable.
        """
        room = self._demand.max_completion_tokens - self.num_output_tokens
        most = min(room, max(self.num_output_tokens, 16))
        sizes = dict.fromkeys([most, max(most // 4, 1), max(most // 16, 1), 1])
        for size in sizes:
            try:
                taken = await self._stores.take(partial(more_output, self._caller, size), may_owe=True)
            except QuotaSpent:
                if size == 1:
                    raise
                continue
            self._taken += taken
            self.num_output_tokens += size
            return

    def undo(self) -> None:
        """Give everything back, as though nothing had been asked."""
        self._is_settled = True
        for store, charge in self._taken:
            self._stores.settle(store, charge, 0)

    def settle(self, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Give back what was not used. Settling again changes nothing."""
        if self._is_settled:
            return
        self._is_settled = True
        left: dict[str, int] = {}  # by bucket, which an extended answer has taken from more than once
        for store, charge in self._taken:
            if charge.kind == "requests":
                used = 1
            elif charge.kind == "concurrent":
                used = 0
            elif charge.kind == "input_tokens":
                used = num_prompt_tokens
            else:
                whole = num_output_tokens + (num_prompt_tokens if charge.family == "budget" else 0)
                used = min(left.setdefault(charge.bucket, whole), charge.amount)
                left[charge.bucket] -= used
            self._stores.settle(store, charge, used)

    def standings(self) -> dict[str, Standing]:
        """The tightest limit of "requests" and of "tokens", where there is one."""
        return _standings(self._taken)


class Admission:
    """Reserves in a store; where that does not answer, in one that `fallback` makes anew each time, or not at all."""

    def __init__(self, store: Store, fallback: Callable[[], Store] | None = None) -> None:
        self._store = store
        self._stores = Stores(store, fallback)
        self._estimates = Estimates()

    async def reserve(self, caller: Caller, demand: Demand) -> Reservation:
        """Raises LimitReached, or LimitsUnavailable."""
        sizes = [demand.max_completion_tokens]
        if demand.is_open_ended:
            usual = min(demand.max_completion_tokens, self._estimates.of(caller.key_id, demand.model))
            rates = [limits.output_tokens_per_minute for limits in (caller.policy.tenant, caller.policy.key)]
            sizes = list(dict.fromkeys([min([usual, *(rate for rate in rates if rate is not None)]), 1]))
        for size in sizes:
            try:
                taken = await self._stores.take(partial(charges, caller, demand.num_prompt_tokens, size))
            except QuotaSpent:
                if size == sizes[-1]:
                    raise
                continue
            return Reservation(self._stores, caller, demand, size, taken)
        raise AssertionError("the last size was taken or refused")

    async def hold(self, caller: Caller) -> Reservation:
        """What any request takes, however small; for one of which it is not known yet how much it asks for.

        Raises LimitReached, or LimitsUnavailable.
        """
        least = Demand(
            request_id="", trace_id="", route="", model="", adapter_id="", num_prompt_tokens=1, max_completion_tokens=0
        )
        return await self.reserve(caller, least)

    def standings(self, caller: Caller) -> dict[str, Standing]:
        """The caller's tightest limits as they stand now, for one that was refused."""
        store = self._stores.current
        return _standings((store, charge) for charge in charges(caller, 0, 0, store.now()))

    def learn(self, key_id: str, model: str, num_output_tokens: int) -> None:
        """An answer was so long."""
        self._estimates.learn(key_id, model, num_output_tokens)

    async def correct(self, callers: Collection[tuple[str, str]]) -> None:
        """Of these tenants and keys the books have learned what a killed process used.

        Raises LimitsUnavailable, and tries again with the tenants' next requests.
        """
        await self._stores.correct(callers)

    async def close(self) -> None:
        """Give back what this process holds."""
        await self._store.close()


def _standings(held: Iterable[tuple[Store, Charge]]) -> dict[str, Standing]:
    """The tightest rate of "requests" and of "tokens" among these, where there is one."""
    found: dict[str, Standing] = {}
    for store, charge in held:
        if charge.family != "rate":
            continue
        standing = store.standing(charge)
        unit = "requests" if charge.kind == "requests" else "tokens"
        if unit not in found or standing.remaining < found[unit].remaining:
            found[unit] = standing
    return found
