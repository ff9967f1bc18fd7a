"""Thinking models: the reasoning between their tags, told apart from the answer while it comes."""

from typing import Literal

from msgspec import Struct

Place = Literal["beginning", "reasoning", "between", "answer"]


class ReasoningTags(Struct, frozen=True, kw_only=True):
    """`markers` in a chat template betray models that use the tags."""

    name: str
    begin: str
    end: str
    markers: tuple[str, ...]


THINK = ReasoningTags(name="think", begin="<think>", end="</think>", markers=("<think>", "</think>"))
MISTRAL_THINK = ReasoningTags(name="mistral", begin="[THINK]", end="[/THINK]", markers=("[THINK]",))
REASONING_TAGS = {tags.name: tags for tags in (THINK, MISTRAL_THINK)}


def reasoning_tags(setting: str, chat_template: str | None) -> ReasoningTags | None:
    """The tags that the setting names; `auto` goes by the template, and finds none where it speaks of none."""
    if setting == "none":
        return None
    if setting != "auto":
        return REASONING_TAGS[setting]
    template = chat_template or ""
    return next((tags for tags in REASONING_TAGS.values() if any(one in template for one in tags.markers)), None)


class ReasoningParser:
    """`feed` gives (reasoning, text) of each piece, white space around the reasoning left out; `finish` the rest.

    With `is_begun` the prompt holds the first tag, and the answer begins inside.
    """

    def __init__(self, tags: ReasoningTags, *, is_begun: bool) -> None:
        self._tags = tags
        self._held = ""
        self._has_told = False
        self._may_repeat = is_begun  # some models write the tag once more
        self.place: Place = "reasoning" if is_begun else "beginning"

    def feed(self, text: str) -> tuple[str, str]:
        self._held += text
        if self.place == "beginning":
            self._begin()
        reasoning = self._reason() if self.place == "reasoning" else ""
        if self.place == "between":
            self._held = self._held.lstrip()
            if self._held:
                self.place = "answer"
        return reasoning, self._take() if self.place == "answer" else ""

    def finish(self) -> tuple[str, str]:
        if self.place == "reasoning":
            rest = self._take().rstrip()
            return rest if self._has_told else rest.lstrip(), ""
        return "", "" if self.place == "between" else self._take()

    def _take(self) -> str:
        taken, self._held = self._held, ""
        return taken

    def _begin(self) -> None:
        stripped = self._held.lstrip()
        if stripped.startswith(self._tags.begin):
            self._held = stripped[len(self._tags.begin) :]
            self.place = "reasoning"
        elif not self._tags.begin.startswith(stripped):
            self.place = "answer"

    def _reason(self) -> str:
        if not self._has_told:
            self._held = self._held.lstrip()
        if self._may_repeat:
            if self._held != self._tags.begin and self._tags.begin.startswith(self._held):
                return ""
            self._may_repeat = False
            self._held = self._held.removeprefix(self._tags.begin).lstrip()
        place = self._held.find(self._tags.end)
        if place >= 0:
            told = self._held[:place].rstrip()
            self._held = self._held[place + len(self._tags.end) :]
            self.place = "between"
            return told
        told = self._held[: len(self._held) - _overlap(self._held, self._tags.end)].rstrip()
        self._has_told = self._has_told or bool(told)
        self._held = self._held[len(told) :]
        return told


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag` (shorter than all of it)."""
    return next((length for length in range(len(tag) - 1, 0, -1) if text.endswith(tag[:length])), 0)
