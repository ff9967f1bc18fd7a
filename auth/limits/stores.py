"""Where limits are counted, and where while that is away."""

from __future__ import annotations

from collections.abc import Callable
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
        """The books have learned what a killed process used: budgets count at least what they say now.

        Raises LimitsUnavailable.
        """
        ...

    def standing(self, charge: Charge) -> Standing: ...

    async def close(self) -> None: ...


class Stores:
    """The main store; while it is away a substitute that `fallback` makes anew for each absence, or none."""

    def __init__(self, main: Store, fallback: Callable[[], Store] | None) -> None:
        self.main = main
        self._fallback = fallback
        self._substitute: Store | None = None

    @property
    def current(self) -> Store:
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
            self._look_for_main()
            raise
        self._look_for_main()
        return [(self.main, charge) for charge in wanted]

    def _look_for_main(self) -> None:
        """What the substitute counted is in the books, where the next one begins."""
        if not self.main.is_away:  # it may have given what it had leased before
            self._substitute = None
