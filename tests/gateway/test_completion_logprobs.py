"""How completions write tokens, and where these stand in the text, for each kind of vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models import make_tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from loraplex.engines.codecs import JsonCodec
from loraplex.engines.protocol import TokenLogprobs
from loraplex.engines.tokenizer import HubTokenizer, TemplatedTokenizer
from loraplex.gateway.openai.completion_logprobs import CompletionLogprobs, EchoedPrompt, TokensAsIds, offsets_of


@pytest.fixture(scope="module")
def sentencepiece() -> TemplatedTokenizer:
    """Words begin with a space that the text's first one loses; what no word has is told in bytes."""
    names = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁ab", "c"]
    tokenizer = Tokenizer(BPE({name: place for place, name in enumerate(names)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return TemplatedTokenizer(JsonCodec(tokenizer), None)


def places(tokenizer: TemplatedTokenizer, token_ids: list[int]) -> tuple[str, list[int]]:
    text = tokenizer.decode(token_ids)
    return text, offsets_of(token_ids, text, tokenizer, tokenizer.special_token_ids)


def test_offsets_count_the_characters_before_a_token(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = HubTokenizer(tmp_path)
    special = min(tokenizer.special_token_ids)
    token_ids = [special, *tokenizer.encode("é😀x", add_special_tokens=False), special, *tokenizer.encode("y")]
    text, found = places(tokenizer, token_ids)
    for token_id, place in zip(token_ids, found, strict=True):
        written = tokenizer.token_bytes(token_id).decode(errors="ignore")
        if token_id not in tokenizer.special_token_ids and written:
            assert text.startswith(written, place)
    assert found == sorted(found)
    assert found[0] == 0


def test_offsets_where_the_text_loses_its_first_space(sentencepiece: TemplatedTokenizer) -> None:
    begin, space, word, letter = 1, 258, 259, 260
    assert places(sentencepiece, [begin, word, letter, word]) == ("abc ab", [0, 0, 2, 3])
    assert places(sentencepiece, [space, word]) == (" ab", [0, 0])
    emoji = [2 + byte for byte in "😀".encode()]
    assert places(sentencepiece, [word, *emoji, letter]) == ("ab😀c", [0, 2, 2, 2, 2, 3])


def test_offsets_of_broken_bytes_are_in_the_text(sentencepiece: TemplatedTokenizer) -> None:
    text, found = places(sentencepiece, [2 + 0x9F, 2 + 0xF0, 260, 2 + 0xFF])
    assert found == sorted(found)
    assert found[-1] <= len(text)


@pytest.mark.parametrize("trims", [False, True], ids=["with-spaces", "without-spaces"])
def test_echoed_text_has_each_token_where_its_spelling_begins(trims: bool) -> None:
    """Many tokenizers leave the space out of a word's place; a beginning and an end that are added have none."""
    text = "é 😀 works works at  the<|mark|> bakery"
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|begin|>", "<|end|>", "<|mark|>"]
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=marks, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator([text] * 9, trainer)
    begin, end = (tokenizer.token_to_id(mark) for mark in marks[:2])
    template = processors.TemplateProcessing(
        "<|begin|> $A <|end|>", special_tokens=[(marks[0], begin), (marks[1], end)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trims), template])
    ours = TemplatedTokenizer(JsonCodec(tokenizer), None)
    ids = ours.encode(text)
    echo = EchoedPrompt(text, ids, ours, skip_special_tokens=True)
    found = echo.offsets()
    assert echo.text == text
    assert (found[0], found[-1]) == (0, len(text))
    for token_id, place in zip(ids[1:-1], found[1:-1], strict=True):
        written = ours.token_bytes(token_id).decode(errors="ignore")
        assert text.startswith(written, place), (written, place)


def test_tokens_written_alike_keep_the_likeliest(sentencepiece: TemplatedTokenizer) -> None:
    described = CompletionLogprobs([], [], [], [])
    same = TokenLogprobs(-0.1, ((260, -0.1), (2 + ord("c"), -2.0), (2 + 0xF0, -3.0), (2 + 0x9F, -4.0)))
    described.add(260, same, 0, sentencepiece)
    assert described.tokens == ["c"]
    assert described.top_logprobs == [{"c": -0.1, r"bytes:\xf0": -3.0, r"bytes:\x9f": -4.0}]


def test_tokens_as_ids_are_all_told_apart() -> None:
    described = CompletionLogprobs([], [], [], [])
    described.add(3, TokenLogprobs(-0.5, ((5, -0.25), (3, -0.5))), 7, TokensAsIds())
    assert described.tokens == ["token_id:3"]
    assert described.top_logprobs == [{"token_id:5": -0.25, "token_id:3": -0.5}]
    assert described.text_offset == [7]
