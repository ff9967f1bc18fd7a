"""Stop strings in texts of any pieces, against a search of the whole text at each piece."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loraplex.engines.stop_strings import StopStrings

LETTERS = st.text("ab", max_size=6)
PIECES = st.lists(st.tuples(LETTERS, st.booleans()), max_size=8)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3)


def told(pieces: list[tuple[str, bool]], stops: list[str], *, includes_stop: bool) -> tuple[list[str], str | None]:
    """What is certain behind each piece, by the meaning of the words."""
    text, num_exempt, certain, found = "", 0, 0, []
    for piece, may_stop in pieces:
        text += piece
        if not may_stop:
            num_exempt = len(text)
        ends = [(at, len(stop), stop) for stop in stops for at in range(len(text))
                if text.startswith(stop, at) and at + len(stop) > max(num_exempt, len(text) - len(piece))]  # fmt: skip
        if ends:
            at, length, stop = min(ends)
            found.append(text[certain : at + length * includes_stop])
            return found, stop
        held = max(
            (size for stop in stops for size in range(len(stop)) if size <= len(text) and text.endswith(stop[:size])),
            default=0,
        )
        found.append(text[certain : len(text) - held])
        certain = len(text) - held
    found.append(text[certain:])
    return found, None


@given(PIECES, STOPS, st.booleans())
def test_any_pieces_are_told_as_far_as_they_are_certain(
    pieces: list[tuple[str, bool]], stops: list[str], includes_stop: bool
) -> None:
    strings, found = StopStrings(stops, includes_stop=includes_stop), []
    for piece, may_stop in pieces:
        found.append(strings.feed(piece, may_stop=may_stop))
        if strings.is_stopped:
            break
        assert strings.num_held == len("".join(text for text, _ in pieces[: len(found)])) - len("".join(found))
    else:
        found.append(strings.finish())
    assert (found, strings.met) == told(pieces, stops, includes_stop=includes_stop)


def test_no_character_is_looked_at_again() -> None:
    looks = 0

    class Stop(str):
        __slots__ = ()

        def __getitem__(self, place: object) -> str:
            nonlocal looks
            looks += 1
            return str.__getitem__(self, place)  # type: ignore[index]

    strings = StopStrings([Stop("ab" * 400 + "c")])
    for _ in range(2000):
        strings.feed("ab")
    assert strings.num_held == 800
    assert looks < 20_000
