"""What this process has leased of one bucket and not used yet."""

from __future__ import annotations

import itertools
import time
from typing import NamedTuple

from loraplex.auth.limits.charges import Family

# Redis remembers the last number of a process longer than an idle pool lives: no pool may begin anew
_numbers = itertools.count(1)


class Outgoing(NamedTuple):
    """A settlement on its way: so much was used for good, so much goes back. Sent again it has the same number."""

    sequence: int
    limit: int
    spent: int
    returned: int


class Pool:
    """One bucket's lease. `held` is what Redis counts as this process's: available, reserved, or used and not told."""

    __slots__ = (
        "available", "bucket", "family", "held", "limit", "num_calls", "outgoing", "spent", "told_at",
        "told_remaining", "until", "used_at",
    )  # fmt: skip

    def __init__(self, bucket: str, family: Family, until: float) -> None:
        self.bucket = bucket
        self.family = family
        self.until = until
        self.limit = 1
        self.available = 0
        self.held = 0
        self.spent = 0
        self.num_calls = 0
        self.outgoing: Outgoing | None = None
        self.used_at = self.told_at = time.monotonic()
        self.told_remaining = 0

    def draw(self, amount: int) -> int:
        """As much of the amount as is here."""
        part = max(min(self.available, amount), 0)
        self.available -= part
        self.used_at = time.monotonic()
        return part

    def granted(self, amount: int, extra: int, remaining: int) -> None:
        """Redis gave the amount, which is used at once, and something beyond it."""
        self.held += amount + extra
        self.available += extra
        self.told_remaining = remaining
        self.told_at = time.monotonic()

    def settle(self, amount: int, used: int) -> None:
        """Of an amount that was drawn so much was used."""
        self.available += amount - used
        if self.family == "budget":
            self.spent += used

    def pack(self, idle_since: float) -> Outgoing | None:
        """What to tell Redis now, if anything: the same again until `outgoing` is cleared."""
        if self.outgoing is None:
            keep = self.limit // 400 if self.used_at > idle_since else 0
            returned = max(self.available - keep, 0)
            if self.spent or returned:
                self.outgoing = Outgoing(next(_numbers), self.limit, self.spent, returned)
                self.available -= returned
                self.held -= self.spent + returned
                self.spent = 0
        return self.outgoing

    def is_forgettable(self, idle_since: float) -> bool:
        is_empty = not (self.available or self.spent or self.num_calls or self.outgoing)
        return is_empty and self.used_at < idle_since and (self.family == "rate" or self.held == 0)
