"""Stop strings and incomplete characters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import make_tokenizer
from tokenizers import Tokenizer

from loraplex.engines.codecs import JsonCodec
from loraplex.engines.native.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())


def feed(
    tokenizer: Tokenizer, text: str, stops: list[str], *, includes_stop: bool = False, min_tokens: int = 0
) -> tuple[list[str], bool]:
    """(what each token released, and the end), whether a stop was met. One token is one byte."""
    stream = JsonCodec(tokenizer).stream(skip_special_tokens=True)
    detokenizer = Detokenizer(stream, stops, includes_stop=includes_stop, min_tokens=min_tokens)
    released = []
    for token in tokenizer.encode(text).ids:
        released.append(detokenizer.feed(token))
        if detokenizer.is_stopped:
            return released, True
    released.append(detokenizer.finish())
    return released, detokenizer.is_stopped


def test_feed_character_of_four_bytes_comes_whole(tokenizer: Tokenizer) -> None:
    released, _ = feed(tokenizer, "a🦜b", [])
    assert released == ["a", "", "", "", "🦜", "b", ""]


def test_feed_possible_stop_is_held_until_decided(tokenizer: Tokenizer) -> None:
    released, stopped = feed(tokenizer, "xENy", ["END"])
    assert (released, stopped) == (["x", "", "", "ENy", ""], False)


def test_feed_stop_cuts_and_ends(tokenizer: Tokenizer) -> None:
    released, stopped = feed(tokenizer, "xENDy", ["END"])
    assert ("".join(released), stopped) == ("x", True)


def test_feed_stop_that_is_included_ends_the_text(tokenizer: Tokenizer) -> None:
    released, stopped = feed(tokenizer, "xENDy", ["END"], includes_stop=True)
    assert ("".join(released), stopped) == ("xEND", True)
    released, stopped = feed(tokenizer, "xENy", ["END"], includes_stop=True)
    assert ("".join(released), stopped) == ("xENy", False)


def test_finish_incomplete_character_is_a_replacement(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(JsonCodec(tokenizer).stream(skip_special_tokens=True), [])
    released = [detokenizer.feed(token) for token in tokenizer.encode("a🦜").ids[:3]]
    assert "".join([*released, detokenizer.finish()]).startswith("a\ufffd")


@given(text=st.text(alphabet="abé🦜", max_size=30), stops=st.lists(st.text(alphabet="abé🦜", min_size=1, max_size=4)))
def test_any_text_is_cut_at_the_first_stop(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    released, stopped = feed(tokenizer, text, stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert ("".join(released), stopped) == (text, False)
        return
    first = min(ends)  # the stop that is complete first ends the answer, and the cut is where the earliest begins
    cut = min(text.find(stop) for stop in stops if 0 <= text.find(stop) <= first - len(stop))
    assert ("".join(released), stopped) == (text[:cut], True)


@given(
    text=st.text(alphabet="ab", max_size=16),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    min_tokens=st.integers(0, 16),
)
def test_stop_that_the_least_tokens_complete_is_text(
    tokenizer: Tokenizer, text: str, stops: list[str], min_tokens: int
) -> None:
    """As vLLM has it: a stop string may begin among the first `min_tokens`, and ends behind them."""
    released, stopped = feed(tokenizer, text, stops, min_tokens=min_tokens)
    for num_tokens in range(min_tokens + 1, len(text) + 1):
        cuts = [num_tokens - len(stop) for stop in stops if text[:num_tokens].endswith(stop)]
        if cuts:
            assert ("".join(released), stopped) == (text[: min(cuts)], True)
            return
    assert ("".join(released), stopped) == (text, False)
