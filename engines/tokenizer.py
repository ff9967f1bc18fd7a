"""A checkpoint's tokenizer and chat template, without torch: this runs in the gateway's process."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from loraplex.engines.chat_template import read_chat_template
from loraplex.engines.errors import InvalidRequest, ModelNotServable
from loraplex.engines.protocol import ChatMessage, TokenSpan

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's way to write any byte as a printable character: those that are printable as themselves, others moved."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(moved)}


_BYTE_OF = _byte_level_alphabet()


class HubTokenizer:
    """`tokenizer.json` and `tokenizer_config.json` (or `chat_template.jinja`) of a Hugging Face checkpoint."""

    def __init__(self, directory: Path, eos_token_ids: frozenset[int] = frozenset()) -> None:
        """Raises ModelNotServable where there is no usable tokenizer."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelNotServable(f"{directory} holds no tokenizer.json")
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_token_ids = eos_token_ids
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special_token_ids = frozenset(token_id for token_id, token in added if token.special)
        self._is_byte_level = "ByteLevel" in str(self._tokenizer.decoder)
        config_path = directory / "tokenizer_config.json"
        config: dict[str, Any] = json.loads(config_path.read_text()) if config_path.is_file() else {}
        self._template = read_chat_template(directory, config)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The only form that lets go of the interpreter's lock while it works, so a thread may take a long text."""
        [encoded] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoded.ids)

    def spans(self, text: str, *, add_special_tokens: bool = True) -> list[TokenSpan]:
        [encoded] = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return [TokenSpan(token_id, *place) for token_id, place in zip(encoded.ids, encoded.offsets, strict=True)]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        name = self._tokenizer.id_to_token(token_id)
        if name is None or token_id in self.special_token_ids:
            return (name or "").encode()
        if match := _BYTE_TOKEN.fullmatch(name):  # SentencePiece's fallback for single bytes
            return bytes([int(match[1], 16)])
        if self._is_byte_level:
            return bytes(_BYTE_OF[symbol] for symbol in name if symbol in _BYTE_OF)
        return name.replace("▁", " ").encode()

    @property
    def chat_template(self) -> str | None:
        return None if self._template is None else self._template.source

    @property
    def template_variables(self) -> frozenset[str]:
        return frozenset() if self._template is None else self._template.variables

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        if self._template is None:
            raise InvalidRequest("this model has no chat template", "messages")
        text = self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=variables,
        )
        return self.encode(text, add_special_tokens=False)

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """A decoder for one answer."""
        return TextStream(self._tokenizer, skip_special_tokens)


class TextStream:
    """Token ids in, the text they complete out; a character whose bytes are incomplete waits."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skips_special = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._token_ids: list[int] = []
        self._length = 0

    def feed(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        text: str = self._stream.step(self._tokenizer, token_id) or ""
        self._length += len(text)
        return text

    def flush(self) -> str:
        """What is left at the end: incomplete characters as U+FFFD."""
        whole: str = self._tokenizer.decode(self._token_ids, skip_special_tokens=self._skips_special)
        return whole[self._length :]
