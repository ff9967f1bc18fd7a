"""One answer's text, taken apart as it comes: reasoning first, then text and tool calls."""

from loraplex.engines.stop_strings import StopStrings
from loraplex.gateway.speech.calls import CallParser
from loraplex.gateway.speech.deltas import Delta, Reasoning, Text
from loraplex.gateway.speech.reasoning import ReasoningParser


class Speech:
    """`feed` each piece, then `finish` once. Without parsers everything is text.

    Stop strings are looked for in the text alone: reasoning and calls have them as they are. After `is_stopped` the
    answer is complete, and nothing more of it is told.
    """

    def __init__(
        self,
        reasoning: ReasoningParser | None = None,
        calls: CallParser | None = None,
        stops: StopStrings | None = None,
        min_tokens: int = 0,
    ) -> None:
        """A stop string that the first `min_tokens` complete is text."""
        self._reasoning = reasoning
        self._calls = calls
        self._stops = StopStrings() if stops is None else stops
        self._num_exempt = min_tokens

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is not part of the answer yet."""
        return self._reasoning is not None and self._reasoning.place == "reasoning"

    @property
    def met(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stops.met

    @property
    def is_stopped(self) -> bool:
        return self.met is not None

    def feed(self, text: str, num_tokens: int = 1) -> list[Delta]:
        """What is certain with the text of so many more tokens."""
        self._num_exempt -= num_tokens
        if self._reasoning is None:
            return self._cut(self._answer(text))
        reasoning, text = self._reasoning.feed(text)
        return self._cut([*_reasoned(reasoning), *self._answer(text)])

    def finish(self) -> list[Delta]:
        """The rest, once no text follows."""
        reasoning, text = ("", "") if self._reasoning is None else self._reasoning.finish()
        answer = self._answer(text)
        rest = self._cut([*_reasoned(reasoning), *answer, *([] if self._calls is None else self._calls.finish())])
        return [*rest, *_said(self._stops.finish())]

    def _answer(self, text: str) -> list[Delta]:
        if not text:
            return []
        return [Text(text)] if self._calls is None else self._calls.feed(text)

    def _cut(self, deltas: list[Delta]) -> list[Delta]:
        """The same up to a stop string; none spans a call."""
        told: list[Delta] = []
        for delta in deltas:
            if self._stops.is_stopped:
                break
            if isinstance(delta, Text):
                told += _said(self._stops.feed(delta.text, may_stop=self._num_exempt < 0))
            else:
                told += [*_said(self._stops.finish()), delta]
        return told


def _reasoned(text: str) -> list[Delta]:
    return [Reasoning(text)] if text else []


def _said(text: str) -> list[Delta]:
    return [Text(text)] if text else []
