"""Tokens of one answer -> its text: whole characters, cut at a stop string, nothing of a possible one too early."""

from __future__ import annotations

from collections.abc import Sequence

from loraplex.engines.stop_strings import StopStrings
from loraplex.engines.text_streams import TextStream


class Detokenizer:
    """`feed` each token, then `finish`. After `is_stopped` the answer is complete: a stop string was met."""

    def __init__(
        self, stream: TextStream, stops: Sequence[str], *, includes_stop: bool = False, min_tokens: int = 0
    ) -> None:
        """Where the text `includes_stop` it ends with the stop string. The first `min_tokens` complete none."""
        self._stream = stream
        self._stops = StopStrings(stops, includes_stop=includes_stop)
        self._num_exempt = min_tokens

    @property
    def met(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.met

    @property
    def is_stopped(self) -> bool:
        return self.met is not None

    @property
    def num_held(self) -> int:
        """How many characters of the text are held back, for they may begin a stop string."""
        return self._stops.num_held

    def feed(self, token_id: int) -> str:
        """The text that is certain after this token."""
        self._num_exempt -= 1
        return self._stops.feed(self._stream.feed(token_id), may_stop=self._num_exempt < 0)

    def finish(self) -> str:
        """The rest, once no token follows."""
        return self._stops.feed(self._stream.flush(), may_stop=self._num_exempt < 0) + self._stops.finish()
