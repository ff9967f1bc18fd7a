"""Vocabularies in tiktoken's format, as Llama 3, Qwen 1 and Kimi first shipped theirs: computed by tiktoken.

A line of the file is a token's bytes in base64 and its rank. Where a text is split before that is said by no file: it
belongs to the family, which `tokenizer_config.json` names by its `tokenizer_class`, or to a `pat_str` in there.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tiktoken

from loraplex.engines.codecs import SYMBOL_OF
from loraplex.engines.errors import InvalidRequest, ModelNotServable
from loraplex.engines.text_streams import BytesStream, TextStream
from loraplex.engines.tokenizer_protocol import TokenSpan

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\s*")
_LONGEST_RUN = 25_000  # characters of whitespace in one piece, as Llama 3's own tokenizer has it
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_ENDS}"
_QWEN_1 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_ENDS}"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_ENDS}"
)


@dataclass(frozen=True, slots=True)
class _Family:
    """How texts are split; the special tokens behind the ranks where no file names them; Unicode's form before."""

    pattern: str
    special: tuple[str, ...] = ()
    form: str | None = None


_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
_FAMILIES = {
    **dict.fromkeys(("PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer"), _Family(_LLAMA_3)),
    **dict.fromkeys(("TokenizersBackend", "TikTokenTokenizerFast"), _Family(_LLAMA_3)),
    "QWenTokenizer": _Family(_QWEN_1, _QWEN_SPECIAL, "NFC"),
    "TikTokenTokenizer": _Family(_KIMI),
}


def find_tiktoken_file(directory: Path) -> Path | None:
    """The vocabulary in this format, by whichever name it goes."""
    named = [directory / "tokenizer.model", directory / "tiktoken.model", *sorted(directory.glob("*.tiktoken"))]
    return next((path for path in named if path.is_file() and _is_tiktoken(path)), None)


def _is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return _LINE.fullmatch(file.readline(4096)) is not None


class TiktokenCodec:
    """Implements Codec."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        """Raises ModelNotServable where the file, or what `tokenizer_config.json` says, does not suffice."""
        family = _family(config, path)
        self._form = family.form
        ranks = _read_ranks(path)
        added = _added_tokens(config) or {
            len(ranks) + place: (token, True) for place, token in enumerate(family.special)
        }
        self.special_token_ids = frozenset(token_id for token_id, (_, special) in added.items() if special)
        self._added = frozenset(added)
        self._begin: list[int] = []
        names = {token: token_id for token_id, (token, _) in added.items()}
        if config.get("add_bos_token"):
            self._begin = [_required(names, config, "bos_token")]
        self.encoding = tiktoken.Encoding(
            path.parent.name, pat_str=family.pattern, mergeable_ranks=ranks, special_tokens=names
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """tiktoken lets go of the interpreter's lock while it works."""
        tokens = self._encode(self._normal(text))
        return self._begin + tokens if add_special_tokens else tokens

    def _encode(self, text: str) -> list[int]:
        """Raises InvalidRequest for what the patterns cannot be matched with."""
        encode = partial(self.encoding.encode, allowed_special="all")
        try:
            return encode(text)
        except ValueError:  # the pattern looks back from the end of a run of whitespace, and has no room for a long one
            pass
        try:
            return [token for piece in _short_runs(text) for token in encode(piece)]
        except ValueError as error:
            raise InvalidRequest("the tokenizer cannot take this text", "prompt") from error

    def spans(self, text: str, *, add_special_tokens: bool) -> list[TokenSpan]:
        """Places in the text as it was normalised; a token of a part of a character has all of it."""
        text = self._normal(text)
        characters = [place for place, character in enumerate(text) for _ in character.encode()]
        found = [TokenSpan(token_id, 0, 0) for token_id in self._begin] if add_special_tokens else []
        begin = 0
        for token_id in self._encode(text):
            end = begin + len(self.token_bytes(token_id))
            found.append(TokenSpan(token_id, characters[begin], characters[end - 1] + 1))
            begin = end
        return found

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        shown = [
            token_id for token_id in token_ids if not skip_special_tokens or token_id not in self.special_token_ids
        ]
        return b"".join(self.token_bytes(token_id) for token_id in shown).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Nothing for an id of the model's head that the vocabulary does not reach."""
        try:
            return self.encoding.decode_single_token_bytes(token_id)
        except KeyError:
            return b""

    def token_name(self, token_id: int) -> str:
        """Its bytes, each as a printable character: a part of a character is no text."""
        token = self.token_bytes(token_id)
        return token.decode() if token_id in self._added else "".join(SYMBOL_OF[byte] for byte in token)

    def token_id(self, name: str) -> int | None:
        found = self.encoding.encode(name, allowed_special="all")
        return found[0] if len(found) == 1 else None

    def stream(self, *, skip_special_tokens: bool) -> TextStream:
        return BytesStream(self.token_bytes, self.special_token_ids if skip_special_tokens else frozenset())

    def _normal(self, text: str) -> str:
        return text if self._form is None else unicodedata.normalize("NFC", text)


def _short_runs(text: str) -> Iterator[str]:
    """The text in pieces, none of which begins or ends elsewhere than in a long run of whitespace."""
    begin = 0
    for run in re.finditer(r"\s+", text):
        while run.end() - max(begin, run.start()) > _LONGEST_RUN:
            end = max(begin, run.start()) + _LONGEST_RUN
            yield text[begin:end]
            begin = end
    yield text[begin:]


def _family(config: Mapping[str, Any], path: Path) -> _Family:
    if isinstance(pattern := config.get("pat_str"), str):
        return _Family(pattern)
    name = config.get("tokenizer_class", "PreTrainedTokenizerFast")
    if name not in _FAMILIES:
        raise ModelNotServable(
            f"{path} is in tiktoken's format, but how {name} splits texts is not known; set pat_str in "
            "tokenizer_config.json"
        )
    return _FAMILIES[name]


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ModelNotServable(f"{path}: line {number} is no token and rank: {error}") from error
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ModelNotServable(f"{path} has no token for the byte {missing[0]}")
    if len(set(ranks.values())) < len(ranks):
        raise ModelNotServable(f"{path} has a rank twice")
    return ranks


def _added_tokens(config: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """(name, whether it is special) by id."""
    added = config.get("added_tokens_decoder") or {}
    return {int(token_id): (str(token["content"]), bool(token.get("special"))) for token_id, token in added.items()}


def _required(names: Mapping[str, int], config: Mapping[str, Any], field: str) -> int:
    token = config.get(field)
    name = token.get("content") if isinstance(token, dict) else token
    if not isinstance(name, str) or name not in names:
        raise ModelNotServable(f"tokenizer_config.json: {field} = {name!r} is not in added_tokens_decoder")
    return names[name]
