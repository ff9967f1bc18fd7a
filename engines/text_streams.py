"""Tokens of one answer -> its text, token by token. What was told stays told, no token raises, each costs the same."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Set
from os.path import commonprefix
from typing import Protocol

_REPLACEMENT = "\ufffd"


class TextStream(Protocol):
    """Token ids in, the text they complete out; a character whose bytes are incomplete waits."""

    def feed(self, token_id: int) -> str: ...

    def flush(self) -> str:
        """What is left at the end: incomplete characters as U+FFFD."""
        ...


class BytesStream:
    """Implements TextStream where a text is nothing but its tokens' bytes."""

    def __init__(self, bytes_of: Callable[[int], bytes], skipped: Set[int]) -> None:
        self._bytes_of, self._skipped = bytes_of, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """Implements TextStream where a token's text depends on its neighbours: decodes the last few with each new one.

    The library's DecodeStream does so too, yet raises where a byte changes what the bytes before it were decoded to,
    and its window grows for as long as a text ends in U+FFFD.

    A run of tokens that are single bytes is decoded to characters, or each of them to U+FFFD where the run as a whole
    is not UTF-8. Characters are told as they are complete and stay told, so that only what follows them in a run that
    breaks is U+FFFD: to wait for the run's end would hold back whole paragraphs of a script that is in no other
    tokens, and the newline that a stop string waits for.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        name_of: Callable[[int], str | None],
        skipped: Set[int],
        byte_tokens: Mapping[int, bytes],
    ) -> None:
        """`decode` leaves out no special tokens: those not to be told are `skipped`."""
        self._decode, self._name_of, self._skipped, self._byte_tokens = decode, name_of, skipped, byte_tokens
        # Where no tokens are single bytes any may end within a character, which then began in the last three.
        self._num_context = 1 if byte_tokens else 3
        self._window: list[int] = []
        self._text = ""  # of the window
        self._told = ""  # what of it is certain
        self._pending: list[int] = []  # bytes of an incomplete character, not yet in the window
        self._character = codecs.getincrementaldecoder("utf-8")()
        self._is_broken = False  # the run of bytes that goes on

    def feed(self, token_id: int) -> str:
        # An id that the vocabulary does not reach has no text either, and ends no run of bytes.
        if token_id in self._skipped or not self._name_of(token_id):
            return ""
        if (byte := self._byte_tokens.get(token_id)) is None:
            lost, self._is_broken = self._give_up() if self._pending else "", False
            return lost + self._add([token_id])
        if self._is_broken:
            return _REPLACEMENT
        self._pending.append(token_id)
        try:
            is_whole = self._character.decode(byte) != ""
        except UnicodeDecodeError:
            self._is_broken = True
            return self._give_up()
        if not is_whole:
            return ""
        whole, self._pending = self._pending, []
        return self._add(whole)

    def flush(self) -> str:
        return self._text[len(self._told) :] + _REPLACEMENT * len(self._pending)

    def _add(self, unit: list[int]) -> str:
        """The text of a token, or of a character's bytes, that is certain now."""
        self._window += unit
        text, told = self._decode(self._window), self._told
        waits = not self._byte_tokens and text.endswith(_REPLACEMENT)  # for the rest of a character, perhaps
        certain = text[:-1] if waits else text
        if not certain.startswith(told):  # a decoder may write a text anew that a later token continues
            told = commonprefix((told, certain))  # noqa: RUF071  characters are meant
        new = certain[len(told) :]
        if len(self._window) > 2 * self._num_context:
            self._window = self._window[-max(self._num_context, len(unit)) :]
            text = self._decode(self._window)
            certain = text[:-1] if waits else text
        self._text, self._told = text, certain
        return new

    def _give_up(self) -> str:
        """The pending bytes are no character. Their first, which is none by itself, stands for all before the next."""
        lost = self.flush()
        self._window, self._pending = self._pending[:1], []
        self._text = self._told = self._decode(self._window)
        self._character.reset()
        return lost
