"""Texts far longer than any use of them: that one has too many tokens is found before all of them are made.

A tokenizer holds some hundred bytes for each token of the text it is given, so that 15 MB at once can take 4 GB.
"""

from __future__ import annotations

from collections.abc import Callable

from loraplex.engines.errors import PromptTooLong
from loraplex.engines.tokenizer_protocol import Room

PIECE = 65_536  # characters
_USUAL = 4  # characters of a token; a text with fewer for each token that there is room for is not looked at
_SLACK = 64  # tokens that a cut may add: those of what it cuts apart


def useful_part(text: str, room: Room, count: Callable[[str], int]) -> str:
    """The text, or its end where the room is for that alone and the text has at least twice as many tokens.

    `count` tells how many tokens a text has; it is asked piece by piece. Raises PromptTooLong where they are more than
    twice as many as there is room for: cut into pieces a text may have a few tokens more, never so many.
    """
    if len(text) <= max(PIECE, _USUAL * room.most):
        return text
    num_tokens = 0
    for number, begin in enumerate(range(0, len(text), PIECE), start=1):
        stop = len(text) - begin if room.keeps_end else begin + PIECE
        start = max(stop - PIECE, 0)
        num_tokens += count(text[start:stop])
        if num_tokens <= 2 * room.most + _SLACK * number:
            continue
        if room.keeps_end:
            return text[start:]
        raise PromptTooLong(f"there is room for {room.most} tokens, and this text has more")
    return text
