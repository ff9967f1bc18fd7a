"""Texts told token by token against `decode` of all the tokens, over every kind of decoder."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loraplex.engines.codecs import SYMBOL_OF, JsonCodec
from loraplex.engines.native.detokenizer import Detokenizer
from loraplex.engines.text_streams import BytesStream, WindowStream

SPECIAL = ["<s>", "</s>"]
ADDED = ["<tool> x", "grün", "<｜call▁begin｜>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LEVEL = [SYMBOL_OF[byte] for byte in range(256)]
PARTS = [
    "".join(SYMBOL_OF[byte] for byte in part) for part in (b"\xac\xe2\x82", b"\xf0\x9f", b" hi", b"\xbf", b"a\xe6")
]
PIECES = ["▁", "▁▁", "▁hello", "a", "b▁", "é", "\ufffd", "##s", "the</w>", ".", " '", "▁."]
FALLBACK = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]

KINDS = {
    "llama": (BYTES + PIECES, decoders.Sequence([*FALLBACK, decoders.Strip(" ", 1, 0)])),
    "gemma": (BYTES + PIECES, decoders.Sequence(FALLBACK)),
    "fallback and metaspace": (BYTES + PIECES, decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "byte level": (LEVEL + PARTS, decoders.ByteLevel()),
    "byte level and more": (LEVEL + PARTS, decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])),
    "metaspace": (PIECES, decoders.Metaspace()),
    "word pieces": (PIECES, decoders.WordPiece()),
    "suffixes": (PIECES, decoders.BPEDecoder()),
    "undecoded bytes": (BYTES + PIECES, decoders.Fuse()),
    "none": (PIECES, None),
}
NUM_UNKNOWN = 3


@cache
def codec_of(kind: str) -> JsonCodec:
    names, decoder = KINDS[kind]
    vocabulary = {name: token_id for token_id, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback="<0x00>" in names))
    if "byte level" in kind:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(name) for name in ADDED])
    return JsonCodec(tokenizer)


def ids_of(codec: JsonCodec, *names: str) -> list[int]:
    found = [codec.token_id(name) for name in names]
    assert None not in found
    return [token_id for token_id in found if token_id is not None]


def streamed(codec: JsonCodec, token_ids: list[int], *, skips: bool = True) -> list[str]:
    """What each token told, and the end."""
    stream = codec.stream(skip_special_tokens=skips)
    return [*map(stream.feed, token_ids), stream.flush()]


def settled(codec: JsonCodec, token_ids: list[int], *, skips: bool) -> list[int]:
    """The tokens with U+FFFD for each byte that a run of bytes cannot make characters of behind its whole ones.

    `decode` has U+FFFD for those too, and for the whole characters before them.
    """
    if "ByteFallback" not in codec.as_json():
        return token_ids
    [replacement] = ids_of(codec, "\ufffd")
    made: list[int] = []
    run: list[int] = []
    for token_id in [*token_ids, replacement]:
        name = codec.token_name(token_id)
        if not name or (skips and token_id in codec.special_token_ids):
            continue
        if name in BYTES:
            run.append(token_id)
            continue
        try:
            b"".join(map(codec.token_bytes, run)).decode()
        except UnicodeDecodeError as error:
            run[error.start :] = [replacement] * (len(run) - error.start)
        made, run = [*made, *run, token_id], []
    return made[:-1]


@st.composite
def sequences(draw: st.DrawFn, kind: str) -> list[int]:
    """Tokens of all sorts, and often of the bytes of a text that was cut and mixed up."""
    codec, (names, _) = codec_of(kind), KINDS[kind]
    num_named = len(names) + len(SPECIAL) + len(ADDED)
    token = st.integers(0, num_named - 1 + NUM_UNKNOWN)
    unusual = st.integers(256, num_named - 1 + NUM_UNKNOWN) if len(names) > 256 else token
    text = st.text("aé汉🦜 \n", max_size=4).map(lambda text: codec.encode(text, add_special_tokens=False))
    cut = st.tuples(text, st.integers(0, 8), st.integers(0, 8)).map(lambda cut: cut[0][cut[1] :][: cut[2]])
    part = st.one_of(token.map(lambda one: [one]), unusual.map(lambda one: [one]), text, cut)
    return [token_id for found in draw(st.lists(part, max_size=20)) for token_id in found]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skips=st.booleans())
def test_stream_of_any_tokens_is_what_decode_makes_of_them(kind: str, data: st.DataObject, skips: bool) -> None:
    codec, token_ids = codec_of(kind), data.draw(sequences(kind))
    expected = codec.decode(settled(codec, token_ids, skips=skips), skip_special_tokens=skips)
    assert "".join(streamed(codec, token_ids, skips=skips)) == expected


@pytest.mark.parametrize("kind", ["llama", "gemma", "byte level", "byte level and more"])
@given(text=st.text("aé汉🦜 \n", max_size=12))
def test_stream_of_a_text_tells_each_character_once_it_is_whole(kind: str, text: str) -> None:
    codec = codec_of(kind)
    token_ids = codec.encode(text, add_special_tokens=False)
    told = ""
    for place, new in enumerate(streamed(codec, token_ids)[:-1], start=1):
        told += new
        raw = b"".join(map(codec.token_bytes, token_ids[:place]))
        num_whole = len(raw.decode(errors="ignore"))
        assert told == codec.decode(codec.encode(text[:num_whole], add_special_tokens=False), skip_special_tokens=True)


@pytest.mark.parametrize(("names", "told"), [
    (["a", "<0xE2>", "b▁"], ["a", "", "\ufffdb ", ""]),
    (["a", "<0xE2>", "<0x82>"], ["a", "", "", "\ufffd\ufffd"]),
    (["<0xE2>", "<0x41>", "<0x42>", "a"], ["", "\ufffd\ufffd", "\ufffd", "a", ""]),
    (["<0xE2>", "<s>", "<0x82>", "<0xAC>", "a"], ["", "", "", "€", "a", ""]),
    (["▁", "<0x80>", "▁hello"], ["", "\ufffd", " hello", ""]),
])  # fmt: skip
def test_broken_bytes_are_a_replacement_each(names: list[str], told: list[str]) -> None:
    codec = codec_of("llama")
    token_ids = ids_of(codec, *names)
    assert streamed(codec, token_ids) == told
    assert "".join(told) == codec.decode(token_ids, skip_special_tokens=True)


def test_characters_before_broken_bytes_stay_told() -> None:
    codec = codec_of("llama")
    token_ids = ids_of(codec, "a", "<0x0A>", "<0xC3>", "<0xA9>", "<0xE2>", "<0x41>", "<0x0A>", "a")
    assert streamed(codec, token_ids) == ["a", "\n", "", "é", "", "\ufffd\ufffd", "\ufffd", "a", ""]
    assert codec.decode(token_ids, skip_special_tokens=True) == "a" + 6 * "\ufffd" + "a"


def test_newline_of_a_byte_token_stops_at_once() -> None:
    codec = codec_of("llama")
    detokenizer = Detokenizer(codec.stream(skip_special_tokens=True), ["\n"])
    assert [detokenizer.feed(token_id) for token_id in ids_of(codec, "▁hello", "<0x0A>")] == ["hello", ""]
    assert detokenizer.is_stopped


def test_decoder_that_writes_anew_what_was_told_loses_nothing() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, " ": 1, "'": 2}, []))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(" '", "'")])
    codec = JsonCodec(tokenizer)
    assert streamed(codec, [0, 1, 2, 0]) == ["a", " ", "'", "a", ""]
    assert codec.decode([0, 1, 2, 0], skip_special_tokens=True) == "a'a"


@pytest.mark.parametrize("kind", ["llama", "byte level and more", "metaspace"])
@given(data=st.data())
def test_window_stays_small(kind: str, data: st.DataObject) -> None:
    codec, token_ids = codec_of(kind), data.draw(sequences(kind)) * 20
    bytes_of = {token_id: codec.token_bytes(token_id) for token_id in range(256)} if "<0x00>" in KINDS[kind][0] else {}
    sizes = [0]

    def decode(window: list[int]) -> str:
        sizes.append(len(window))
        return codec.decode(window, skip_special_tokens=False)

    stream = WindowStream(decode, codec.token_name, codec.special_token_ids, bytes_of)
    for token_id in token_ids:
        stream.feed(token_id)
    assert max(sizes) <= 8


def test_byte_level_needs_no_window() -> None:
    assert isinstance(codec_of("byte level").stream(skip_special_tokens=True), BytesStream)


def test_token_bytes_of_a_name_outside_the_alphabet_are_its_text() -> None:
    codec = codec_of("byte level")
    assert [codec.token_bytes(token_id) for token_id in ids_of(codec, "<tool> x", "<｜call▁begin｜>")] == [
        b"<tool> x", "<｜call▁begin｜>".encode(),
    ]  # fmt: skip
