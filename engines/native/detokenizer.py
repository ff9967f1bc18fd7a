"""Tokens of one answer -> its text: whole characters, cut at a stop string, nothing of a possible one too early."""

from __future__ import annotations

from collections.abc import Sequence

from loraplex.engines.text_streams import TextStream


class Detokenizer:
    """`feed` each token, then `finish`. After `is_stopped` the answer is complete: a stop string was met."""

    def __init__(self, stream: TextStream, stops: Sequence[str], *, includes_stop: bool = False) -> None:
        """The text ends before the stop string, or with it where it `includes_stop`."""
        self._stream = stream
        self._includes_stop = includes_stop
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.is_stopped = False

    def feed(self, token_id: int) -> str:
        """The text that is certain after this token."""
        return self._release(self._stream.feed(token_id))

    def finish(self) -> str:
        """The rest, once no token follows."""
        text = self._release(self._stream.flush())
        if not self.is_stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if not self._stops:
            return text
        held = self._held + text
        found = [(at, len(stop)) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            at, length = min(found)
            return held[: at + length * self._includes_stop]
        keep = max(_overlap(held, stop) for stop in self._stops)
        certain = len(held) - keep
        self._held = held[certain:]
        return held[:certain]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` (shorter than all of it)."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
