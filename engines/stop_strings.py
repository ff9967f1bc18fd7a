"""Stop strings in a text that comes in pieces: it ends at the first, and no part of one is told too early."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """`feed` each piece, then `finish`. After `is_stopped` the text is complete: a stop string was `met`."""

    def __init__(self, stops: Sequence[str] = (), *, includes_stop: bool = False) -> None:
        """The text ends before the stop string, or with it where it `includes_stop`."""
        self._stops = [stop for stop in stops if stop]
        self._includes_stop = includes_stop
        self._held = ""
        self._num_exempt = 0  # of the held characters; no stop string ends among them
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
        held = self._held + text
        if not may_stop:
            self._num_exempt = len(held)
        found = [(at, len(stop), stop) for stop in self._stops
                 if (at := held.find(stop, max(self._num_exempt - len(stop) + 1, 0))) >= 0]  # fmt: skip
        if found:
            self._held = ""
            at, length, self.met = min(found)
            return held[: at + length * self._includes_stop]
        certain = len(held) - max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[certain:]
        self._num_exempt = max(self._num_exempt - certain, 0)
        return held[:certain]

    def finish(self) -> str:
        """The rest, where no text follows it."""
        rest, self._held, self._num_exempt = self._held, "", 0
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` (shorter than all of it)."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
