"""Long texts are counted piece by piece: what is refused, what is kept, and how much of them is looked at."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from loraplex.engines.codecs import JsonCodec
from loraplex.engines.errors import PromptTooLong
from loraplex.engines.long_texts import PIECE
from loraplex.engines.tokenizer import TemplatedTokenizer
from loraplex.engines.tokenizer_protocol import Room

CORPUS = ["the quick brown fox jumps over the lazy dog " * 3, "Grüße, 汉字 and 12345 numbers; f(x) = x ** 2\n\n"] * 5


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def sentence_piece() -> Tokenizer:
    """As Llama 2's: no words, so that the whole text is one."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
    )
    return trained


def word_piece() -> Tokenizer:
    """As BERT's: a long word is one unknown token, whitespace none."""
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    )
    return trained


KINDS = {"byte level": byte_level, "sentence piece": sentence_piece, "word piece": word_piece}
BLANK = " " * 200_000


def made_texts() -> dict[str, str]:
    chance = random.Random(3)
    words = ["the", "quick", "fox", "汉字", "12345", "zzz", "f(x)", "\n\n", "   ", "Grüße"]
    prose = " ".join(chance.choice(words) for _ in range(40_000))
    return {
        "prose": prose,
        "blanks": BLANK,
        "one word": "x" * 200_000,
        "blanks and prose": BLANK + prose,
        "prose and blanks": prose + BLANK,
    }


TEXTS = made_texts()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEXTS)
def test_room_changes_no_token_of_what_fits_and_refuses_what_is_far_beyond(kind: str, name: str) -> None:
    tokenizer, text = TemplatedTokenizer(JsonCodec(KINDS[kind]()), None), TEXTS[name]
    whole = tokenizer.encode(text)
    assert tokenizer.encode(text, room=Room(len(whole))) == whole
    assert tokenizer.encode(text, room=Room(len(whole), keeps_end=True)) == whole
    spans = tokenizer.spans(text, room=Room(len(whole)))
    assert [span.token_id for span in spans] == whole
    for most in (7, 1000, 10_000):
        assert tokenizer.encode(text, room=Room(most, keeps_end=True)) == whole[-most:]
        if len(whole) > 3 * most + PIECE:
            with pytest.raises(PromptTooLong, match=f"room for {most} tokens"):
                tokenizer.encode(text, room=Room(most))
            with pytest.raises(PromptTooLong, match=f"room for {most} tokens"):
                tokenizer.spans(text, room=Room(most))


class Watched(JsonCodec):
    """Remembers how long the texts were that it was given."""

    def __init__(self) -> None:
        super().__init__(byte_level())
        self.lengths: list[int] = []

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.lengths.append(len(text))
        return super().encode(text, add_special_tokens=add_special_tokens)


def refuse(tokenizer: TemplatedTokenizer, text: str) -> None:
    with pytest.raises(PromptTooLong):
        tokenizer.encode(text, room=Room(2048))


def keep_end(tokenizer: TemplatedTokenizer, text: str) -> None:
    assert len(tokenizer.encode(text, room=Room(2048, keeps_end=True))) == 2048


@pytest.mark.parametrize("use", [refuse, keep_end], ids=["refused", "cut"])
def test_no_more_is_looked_at_than_it_takes(use: Callable[[TemplatedTokenizer, str], None]) -> None:
    codec = Watched()
    use(TemplatedTokenizer(codec, None), "a1 " * 5_000_000)
    assert max(codec.lengths) <= PIECE
    assert sum(codec.lengths) <= 2 * PIECE


def test_usual_text_is_looked_at_once() -> None:
    codec = Watched()
    text = "the quick brown fox " * 20_000
    TemplatedTokenizer(codec, None).encode(text, room=Room(len(text) // 4))
    assert codec.lengths == [len(text)]
