"""One answer's text, taken apart as it comes: reasoning first, then text and tool calls."""

from loraplex.gateway.speech.calls import CallParser
from loraplex.gateway.speech.deltas import Delta, Reasoning, Text
from loraplex.gateway.speech.reasoning import ReasoningParser


class Speech:
    """`feed` each piece, then `finish` once. Without parsers everything is text."""

    def __init__(self, reasoning: ReasoningParser | None = None, calls: CallParser | None = None) -> None:
        self._reasoning = reasoning
        self._calls = calls

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is not part of the answer yet."""
        return self._reasoning is not None and self._reasoning.place == "reasoning"

    def feed(self, text: str) -> list[Delta]:
        if self._reasoning is None:
            return self._answer(text)
        reasoning, text = self._reasoning.feed(text)
        return [*_reasoned(reasoning), *self._answer(text)]

    def finish(self) -> list[Delta]:
        """The rest, once no text follows."""
        reasoning, text = ("", "") if self._reasoning is None else self._reasoning.finish()
        answer = self._answer(text)
        return [*_reasoned(reasoning), *answer, *([] if self._calls is None else self._calls.finish())]

    def _answer(self, text: str) -> list[Delta]:
        if not text:
            return []
        return [Text(text)] if self._calls is None else self._calls.feed(text)


def _reasoned(text: str) -> list[Delta]:
    return [Reasoning(text)] if text else []
