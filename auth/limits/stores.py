"""Where limits are counted, and where while that is away."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Protocol

from loraplex.auth.errors import LimitReached, LimitsUnavailable
from loraplex.auth.limits.charges import Charge, Standing


class Store(Protocol):
    """Where limits are counted."""

    @property
    def is_away(self) -> bool:
        """Whether it did not answer when it was last asked."""
        ...

    def now(self) -> float:
        """Seconds since 1970, by the clock that every gateway on this store shares."""
        ...

    async def take(self, wanted: list[Charge], *, may_owe: bool = False) -> None:
        """All of it or nothing. With `may_owe` a rate gives what it has not, and refills later.

        Raises LimitReached, or LimitsUnavailable where the store does not answer.
        """
        ...

    def settle(self, charge: Charge, used: int) -> None:
        """Of what was taken so much was used; the rest comes back."""
        ...

    async def correct(self, tenant_id: str, key_id: str | None) -> None:
        """The books know what the store does not: budgets count at least what they say now.

        Raises LimitsUnavailable.
        """
        ...

    def standing(self, charge: Charge) -> Standing: ...

    async def close(self) -> None: ...


class Stores:
    """The main store; while it is away a substitute that `fallback` makes anew for each absence, or none.

    What was used of budgets meanwhile is in the books, from which the main store learns it once it is back.
    """

    def __init__(self, main: Store, fallback: Callable[[], Store] | None) -> None:
        self.main = main
        self._fallback = fallback
        self._substitute: Store | None = None
        self._untold: dict[str, set[str | None]] = {}  # by tenant the keys, and None for all of them together

    @property
    def current(self) -> Store:
        """The one that counts at the moment."""
        return self._substitute or self.main

    async def take(
        self, wanted_at: Callable[[float], list[Charge]], *, may_owe: bool = False
    ) -> list[tuple[Store, Charge]]:
        """Take what is wanted at a store's time: each charge with the store that gave it.

        Raises LimitReached, or LimitsUnavailable.
        """
        wanted = wanted_at(self.main.now())
        if not wanted:
            return []
        if wanted[0].tenant_id in self._untold and not self.main.is_away:
            with suppress(LimitsUnavailable):  # it stays untold until the next request
                await self._tell(wanted[0].tenant_id)
        try:
            await self.main.take(wanted, may_owe=may_owe)
        except LimitsUnavailable:
            if self._fallback is None:
                raise
            substitute = self._substitute = self._substitute or self._fallback()
            wanted = wanted_at(substitute.now())
            await substitute.take(wanted, may_owe=may_owe)
            return [(substitute, charge) for charge in wanted]
        except LimitReached:
            self._end_absence()
            raise
        self._end_absence()
        return [(self.main, charge) for charge in wanted]

    def settle(self, store: Store, charge: Charge, used: int) -> None:
        """Of what was taken from this store so much was used."""
        store.settle(charge, used)
        if store is not self.main and charge.family == "budget":
            self._untold.setdefault(charge.tenant_id, set()).add(charge.key_id)

    async def correct(self, callers: Collection[tuple[str, str]]) -> None:
        """The books know more of these tenants and keys than the main store.

        Raises LimitsUnavailable; what it has not learned then it learns with the tenant's next requests.
        """
        for tenant_id, key_id in callers:
            self._untold.setdefault(tenant_id, set()).update((None, key_id))
        for tenant_id in {tenant_id for tenant_id, _ in callers}:
            await self._tell(tenant_id)

    async def _tell(self, tenant_id: str) -> None:
        key_ids = self._untold.pop(tenant_id, set())
        try:
            for key_id in key_ids:
                await self.main.correct(tenant_id, key_id)
        except BaseException:
            self._untold.setdefault(tenant_id, set()).update(key_ids)
            raise

    def _end_absence(self) -> None:
        """Where the main store is back: what the substitute counted is in the books, where the next one begins."""
        if not self.main.is_away:  # else it gave what it had leased before
            self._substitute = None
