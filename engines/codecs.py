"""Text to token ids and back, by `tokenizer.json`: what a tokenizer does apart from its chat template."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from loraplex.engines.errors import InvalidRequest
from loraplex.engines.text_streams import BytesStream, TextStream, WindowStream
from loraplex.engines.tokenizer_protocol import TokenSpan

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's fallback for single bytes


class Codec(Protocol):
    """One vocabulary. Its methods are those of `protocol.Tokenizer`."""

    @property
    def special_token_ids(self) -> frozenset[int]: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def spans(self, text: str, *, add_special_tokens: bool) -> list[TokenSpan]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_name(self, token_id: int) -> str: ...

    def token_id(self, name: str) -> int | None:
        """The other way round; None where there is no such token."""
        ...

    def stream(self, *, skip_special_tokens: bool) -> TextStream: ...


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's way to write any byte as a printable character: those that are printable as themselves, others moved."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(moved)}


_BYTE_OF = _byte_level_alphabet()
SYMBOL_OF = {byte: symbol for symbol, byte in _BYTE_OF.items()}


def _byte_tokens(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Tokens that the decoder reads as single bytes."""
    if "ByteFallback" not in str(tokenizer.decoder):
        return {}
    named = {f"<0x{byte:{digits}}>": bytes([byte]) for byte in range(256) for digits in ("02X", "02x")}
    found = {tokenizer.token_to_id(name): byte for name, byte in named.items()}
    return {token_id: byte for token_id, byte in found.items() if token_id is not None}


def _byte_level(name: str) -> bytes:
    """A name with a character outside the alphabet is no bytes but a text, as the library has it."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, name))
    except KeyError:
        return name.encode()


@contextmanager
def _refusing_panics() -> Iterator[None]:
    """Raises InvalidRequest where the library panics: in Rust that is no Exception, and would pass every handler."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InvalidRequest("the tokenizer cannot take this text", "prompt") from error


class JsonCodec:
    """The library that `tokenizer.json` belongs to."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special_token_ids = frozenset(token_id for token_id, token in added if token.special)
        self._is_byte_level = "ByteLevel" in str(self._tokenizer.decoder)
        self._byte_tokens = _byte_tokens(tokenizer)

    def as_json(self) -> str:
        """The `tokenizer.json` that it is."""
        return str(self._tokenizer.to_str())

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The only form that lets go of the interpreter's lock while it works, so a thread may take a long text."""
        with _refusing_panics():
            [encoded] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoded.ids)

    def spans(self, text: str, *, add_special_tokens: bool) -> list[TokenSpan]:
        with _refusing_panics():
            [encoded] = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return [TokenSpan(token_id, *place) for token_id, place in zip(encoded.ids, encoded.offsets, strict=True)]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        name = self._tokenizer.id_to_token(token_id)
        if name is None or token_id in self.special_token_ids:
            return (name or "").encode()
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(match[1])
        if self._is_byte_level:
            return _byte_level(name)
        return name.replace("▁", " ").encode()

    def token_name(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""

    def token_id(self, name: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(name)
        return found

    def stream(self, *, skip_special_tokens: bool) -> TextStream:
        skipped = self.special_token_ids if skip_special_tokens else frozenset()
        if isinstance(self._tokenizer.decoder, ByteLevel):
            return BytesStream(lambda token_id: _byte_level(self.token_name(token_id)), skipped)
        decode = partial(self._tokenizer.decode, skip_special_tokens=False)
        return WindowStream(decode, self._tokenizer.id_to_token, skipped, self._byte_tokens)
