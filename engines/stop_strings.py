"""Stop strings in a text that comes in pieces: it ends at the first, and no part of one is told too early."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


class StopStrings:
    """`feed` each piece, then `finish`. After `is_stopped` the text is complete: a stop string was `met`."""

    def __init__(self, stops: Sequence[str] = (), *, includes_stop: bool = False) -> None:
        """The text ends before the stop string, or with it where it `includes_stop`."""
        self._stops = [_Followed(stop) for stop in stops if stop]
        self._includes_stop = includes_stop
        self._held = ""
        self.met: str | None = None

    @property
    def is_stopped(self) -> bool:
        return self.met is not None

    @property
    def num_held(self) -> int:
        """How many characters wait for what follows them."""
        return len(self._held)

    def feed(self, text: str, *, may_stop: bool = True) -> str:
        """The text that is certain after this piece. One that may not stop is text, whatever ends in it."""
        if not self._stops:
            return text
        num_before = len(self._held)
        held = self._held + text
        found = [
            (num_before + end - len(one.stop), len(one.stop), one.stop)
            for one in self._stops
            if (end := one.follow(text, may_stop=may_stop)) is not None
        ]
        if found:
            self._held = ""
            at, length, self.met = min(found)
            return held[: at + length * self._includes_stop]
        certain = len(held) - max(one.num_met for one in self._stops)
        self._held = held[certain:]
        return held[:certain]

    def finish(self) -> str:
        """The rest, where no text follows it."""
        rest, self._held = self._held, ""
        return rest


class _Followed:
    """One stop string, and how much of it the text ends with: as many characters as `num_met`."""

    __slots__ = ("_borders", "num_met", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_met = 0
        self._borders = _borders(stop)

    def follow(self, text: str, *, may_stop: bool) -> int | None:
        """Go on with a piece; how many of its characters the first whole stop string ends behind, if it holds one.

        Knuth, Morris and Pratt (1977), doi 10.1137/0206024: no character is looked at again.
        """
        stop, borders, met = self.stop, self._borders, self.num_met
        if not met and stop[0] not in text:
            return None
        for number, character in enumerate(text, start=1):
            while met and stop[met] != character:
                met = borders[met - 1]
            if stop[met] == character:
                met += 1
            if met == len(stop):
                if may_stop:
                    return number
                met = borders[met - 1]
        self.num_met = met
        return None


@lru_cache(maxsize=1024)
def _borders(stop: str) -> tuple[int, ...]:
    """Of each beginning the longest shorter one that it ends with."""
    found, met = [0], 0
    for character in stop[1:]:
        while met and stop[met] != character:
            met = found[met - 1]
        if stop[met] == character:
            met += 1
        found.append(met)
    return tuple(found)
