"""A checkpoint's tokenizer and chat template, without torch: this runs in the gateway's process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from loraplex.engines.errors import InvalidRequest, ModelNotServable
from loraplex.engines.protocol import ChatMessage

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
        self._special = {id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._is_byte_level = "ByteLevel" in str(self._tokenizer.decoder)
        config_path = directory / "tokenizer_config.json"
        self._config: dict[str, Any] = json.loads(config_path.read_text()) if config_path.is_file() else {}
        self._template = _chat_template(directory, self._config)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The only form that lets go of the interpreter's lock while it works, so a thread may take a long text."""
        [encoded] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoded.ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        name = self._tokenizer.id_to_token(token_id)
        if name is None or token_id in self._special:
            return (name or "").encode()
        if match := _BYTE_TOKEN.fullmatch(name):  # SentencePiece's fallback for single bytes
            return bytes([int(match[1], 16)])
        if self._is_byte_level:
            return bytes(_BYTE_OF[symbol] for symbol in name if symbol in _BYTE_OF)
        return name.replace("▁", " ").encode()

    def encode_chat(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> list[int]:
        return self.encode(self.render_chat(messages, add_generation_prompt), add_special_tokens=False)

    def render_chat(self, messages: Sequence[ChatMessage], add_generation_prompt: bool) -> str:
        """The conversation as text. Raises InvalidRequest where the template refuses it."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template", "messages")
        try:
            return self._template(
                messages=[_as_dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **{name: _token_text(self._config.get(name)) for name in ("bos_token", "eos_token", "pad_token")},
            )
        except TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses this conversation: {error}", "messages") from error

    def stream(self) -> TextStream:
        """A decoder for one answer."""
        return TextStream(self._tokenizer)


class TextStream:
    """Token ids in, the text they complete out; a character whose bytes are incomplete waits."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._length = 0

    def feed(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        text: str = self._stream.step(self._tokenizer, token_id) or ""
        self._length += len(text)
        return text

    def flush(self) -> str:
        """What is left at the end: incomplete characters as U+FFFD."""
        whole: str = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        return whole[self._length :]


def _chat_template(directory: Path, config: dict[str, Any]) -> Callable[..., str] | None:
    path = directory / "chat_template.jinja"
    source = path.read_text() if path.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several named templates: the default one
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if not isinstance(source, str):
        return None
    # The environment that transformers renders templates in, so that they mean the same here.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source).render


def _as_dict(message: ChatMessage) -> dict[str, str]:
    named = {"name": message.name} if message.name is not None else {}
    return {"role": message.role, "content": message.content, **named}


def _to_json(value: object, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _token_text(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token
