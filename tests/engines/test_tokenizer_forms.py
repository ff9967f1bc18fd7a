"""Every form a tokenizer ships in, against transformers' own reading of it and the libraries the forms belong to."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from loraplex.engines.codecs import _BYTE_OF
from loraplex.engines.errors import InvalidRequest, ModelNotServable
from loraplex.engines.native.grammar import Grammars
from loraplex.engines.protocol import Grammar
from loraplex.engines.tiktoken_codec import _FAMILIES
from loraplex.engines.tokenizer import HubTokenizer
from loraplex.engines.tokenizer_protocol import ChatMessage

SENTENCES = [
    "It's a plain sentence, with numbers 12345 and 6.7.", "HELLO Hello hello, WE'LL see what they've got!",
    "  leading   and inner\n\n\n spaces\t\tand tabs \r\n", "Grüße 🦜, 汉字漢字 mixed中文with latin, ñandú и кириллица",
    "def f(x):\n    return x ** 2  # ünï", "a" * 300, "", " ", "\u00e9 e\u0301",
]  # fmt: skip
SPECIAL = ("<|begin|>", "<|end|>", "<|user|>")
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"


def write_tiktoken(directory: Path, name: str, **config: Any) -> int:
    """A vocabulary trained on the sentences; returns how many ranks it has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    decoded = sorted((token_id, _bytes_of(symbol)) for symbol, token_id in tokenizer.get_vocab().items())
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, (_, token) in enumerate(decoded)]
    (directory / name).write_bytes(b"\n".join(lines) + b"\n")
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return len(lines)


def _bytes_of(symbol: str) -> bytes:
    return bytes(_BYTE_OF[character] for character in symbol)


def added(first: int) -> dict[str, Any]:
    return {str(first + place): {"content": name, "special": place < 2} for place, name in enumerate(SPECIAL)}


@pytest.mark.parametrize("text", [" " * 1_000_000 + "x", "a b" + " \n" * 600_000 + "  end"], ids=["spaces", "lines"])
def test_whitespace_beyond_what_tiktoken_matches_at_once(tmp_path: Path, text: str) -> None:
    write_tiktoken(tmp_path, "tokenizer.model")
    tokenizer = HubTokenizer(tmp_path)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokens[-1] == tokenizer.encode(text[-10:])[-1]
    assert [span.token_id for span in tokenizer.spans(text)] == tokens


def test_text_that_no_pattern_matches_is_refused(tmp_path: Path) -> None:
    write_tiktoken(tmp_path, "tokenizer.model", pat_str=r"[^z]+(?!\S)|.")
    tokenizer = HubTokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("xxz y")) == "xxz y"
    with pytest.raises(InvalidRequest, match="cannot take this text"):
        tokenizer.encode("x" * 1_000_000 + "z")


def converted(path: Path, kind: str, special: list[str]) -> Tokenizer:
    """Hugging Face's form of the same file."""
    pattern = _FAMILIES[kind].pattern
    made: Any = TikTokenConverter(str(path), pattern, extra_special_tokens=special)  # type: ignore[no-untyped-call]
    tokenizer: Tokenizer = made.converted()
    return tokenizer


@pytest.mark.parametrize(("kind", "name"), [
    ("PreTrainedTokenizerFast", "tokenizer.model"), ("QWenTokenizer", "qwen.tiktoken"),
    ("TikTokenTokenizer", "tiktoken.model"),
])  # fmt: skip
def test_tiktoken_file_equals_its_hugging_face_form(kind: str, name: str, tmp_path: Path) -> None:
    first = write_tiktoken(tmp_path, name)
    config = {"tokenizer_class": kind, "bos_token": "<|begin|>", "add_bos_token": True, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": added(first)}))
    ours, theirs = HubTokenizer(tmp_path), converted(tmp_path / name, kind, list(SPECIAL))
    for text in [*SENTENCES, "<|user|>hi there<|end|>", "x<|begin|>"]:
        if kind == "QWenTokenizer":
            text = text.replace("e\u0301", "")  # which it composes first
        tokens = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == tokens.ids, text
        assert ours.encode(text) == [first, *tokens.ids]
        assert ours.decode(tokens.ids, skip_special_tokens=False) == text
        found = ours.spans(text, add_special_tokens=False)
        assert [span.token_id for span in found] == tokens.ids
        assert [(span.start, span.stop) for span in found] == tokens.offsets
        stream = ours.stream(skip_special_tokens=False)
        assert "".join(map(stream.feed, tokens.ids)) + stream.flush() == text
    assert ours.special_token_ids == {first, first + 1}
    assert ours.decode([first, *theirs.encode("hi").ids, first + 1]) == "hi"
    assert ours.token_bytes(first) == b"<|begin|>"
    assert ours.token_name(first) == "<|begin|>"
    assert [ours.token_name(token_id) for token_id in range(first)] == [theirs.id_to_token(n) for n in range(first)]
    assert ours.token_bytes(first + 9999) == b""
    chat = ours.encode_chat([ChatMessage(role="user", content="hi")])
    assert chat == theirs.encode("<|begin|><|user|>hi<|end|>", add_special_tokens=False).ids


def test_tiktoken_stream_waits_for_whole_characters_and_marks_broken_ones(tmp_path: Path) -> None:
    write_tiktoken(tmp_path, "tokenizer.model")
    tokenizer = HubTokenizer(tmp_path)
    token_ids = [token_id for byte in "🦜".encode() for token_id in range(256)
                 if tokenizer.token_bytes(token_id) == bytes([byte])]  # fmt: skip
    stream = tokenizer.stream()
    assert [stream.feed(token_id) for token_id in token_ids] == ["", "", "", "🦜"]
    assert (stream.feed(token_ids[0]), stream.flush()) == ("", "\ufffd")


def test_qwens_special_tokens_stand_behind_its_ranks_and_texts_are_composed(tmp_path: Path) -> None:
    first = write_tiktoken(tmp_path, "qwen.tiktoken", tokenizer_class="QWenTokenizer")
    tokenizer = HubTokenizer(tmp_path)
    assert tokenizer.encode("<|endoftext|><|im_start|><|extra_204|>") == [first, first + 1, first + 207]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_grammars_follow_a_tiktoken_vocabulary(tmp_path: Path) -> None:
    first = write_tiktoken(tmp_path, "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added(first)}))
    tokenizer = HubTokenizer(tmp_path)
    grammars = Grammars(tmp_path, first + 3, frozenset({first + 1}))
    grammar = Grammar(kind="choice", source='["yes", "no"]')
    grammars.begin(grammar)
    while grammar not in grammars.ready():
        pass
    [mask] = grammars.constraint(grammar).masks([])
    admitted = {token_id for token_id in range(first) if mask[token_id // 8] >> token_id % 8 & 1}
    assert {tokenizer.token_bytes(token_id) for token_id in admitted} <= {b"y", b"n", b"ye", b"yes", b"no"}
    assert {b"y", b"n"} <= {tokenizer.token_bytes(token_id) for token_id in admitted}


@pytest.mark.parametrize(("line", "config", "says"), [
    (b"!!! 7", {}, "line 431 is no token and rank"), (b"YWJj seven", {}, "line 431 is no token and rank"),
    (b"enp6enp6 3", {}, "has a rank twice"),
    (b"", {"tokenizer_class": "OddTokenizer"}, "how OddTokenizer splits texts is not known"),
    (b"", {"add_bos_token": True, "bos_token": "<s>"}, "bos_token = '<s>' is not in added_tokens_decoder"),
])  # fmt: skip
def test_unusable_tiktoken_files_are_refused_with_the_reason(
    line: bytes, config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    assert write_tiktoken(tmp_path, "tokenizer.model", **config) == 430
    path = tmp_path / "tokenizer.model"
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(ModelNotServable, match=says):
        HubTokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_file_is_read_as_its_own_library_and_transformers_do(kind: str, tmp_path: Path) -> None:
    """Llama's tokenizer in transformers sets no space before a text that begins with one; SentencePiece does."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(sentence for sentence in SENTENCES if sentence.strip()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, model_type=kind, minloglevel=2,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        hard_vocab_limit=False,
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer" if kind == "bpe" else "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "</s>", "unk_token": "<unk>"}))
    ours = HubTokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    hugging_face = AutoTokenizer.from_pretrained(tmp_path)
    for text in SENTENCES[:5]:
        assert ours.encode(text, add_special_tokens=False) == hugging_face.encode(text, add_special_tokens=False)
        if kind == "bpe" and text.startswith(" "):
            continue
        token_ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == token_ids
        assert ours.decode(token_ids) == text
        assert b"".join(ours.token_bytes(token_id) for token_id in token_ids).decode() == f" {text}"


def test_broken_sentencepiece_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\0\1\2 no such thing")
    with pytest.raises(ModelNotServable, match="transformers reads no tokenizer there"):
        HubTokenizer(tmp_path)


def test_directory_without_any_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotServable, match=r"holds no tokenizer\.json, no tokenizer\.model and no tiktoken file"):
        HubTokenizer(tmp_path)
