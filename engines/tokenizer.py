"""A checkpoint's tokenizer and chat template, without torch: this runs in the gateway's process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from loraplex.engines.chat_template import read_chat_template
from loraplex.engines.codecs import Codec, JsonCodec
from loraplex.engines.errors import InvalidRequest, ModelNotServable
from loraplex.engines.long_texts import useful_part
from loraplex.engines.text_streams import TextStream
from loraplex.engines.tiktoken_codec import TiktokenCodec, find_tiktoken_file
from loraplex.engines.tokenizer_protocol import ChatMessage, Room, TokenSpan

# Forms that transformers turns into a `tokenizer.json`.
_CONVERTIBLE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
_PLAIN_TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


class Template(Protocol):
    """A chat template, wherever it runs; see `ChatTemplate`."""

    @property
    def source(self) -> str: ...

    @property
    def variables(self) -> frozenset[str]: ...

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str: ...


class TemplatedTokenizer:
    """A vocabulary and a chat template: all that `protocol.Tokenizer` asks.

    `own_ends` are tokens that end an answer though the base's checkpoint does not say so.
    """

    own_ends: frozenset[int] = frozenset()

    def __init__(self, codec: Codec, template: Template | None, eos_token_ids: frozenset[int] = frozenset()) -> None:
        self.codec, self.template = codec, template
        self.eos_token_ids = eos_token_ids

    @property
    def special_token_ids(self) -> frozenset[int]:
        return self.codec.special_token_ids

    def encode(self, text: str, *, add_special_tokens: bool = True, room: Room | None = None) -> list[int]:
        if room is None:
            return self.codec.encode(text, add_special_tokens=add_special_tokens)
        tokens = self.codec.encode(useful_part(text, room, self._count), add_special_tokens=add_special_tokens)
        return tokens[-room.most :] if room.keeps_end else tokens

    def spans(self, text: str, *, add_special_tokens: bool = True, room: Room | None = None) -> list[TokenSpan]:
        if room is not None:
            useful_part(text, room, self._count)
        return self.codec.spans(text, add_special_tokens=add_special_tokens)

    def _count(self, text: str) -> int:
        return len(self.codec.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self.codec.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        return self.codec.token_bytes(token_id)

    @property
    def chat_template(self) -> str | None:
        return None if self.template is None else self.template.source

    @property
    def template_variables(self) -> frozenset[str]:
        return frozenset() if self.template is None else self.template.variables

    @property
    def renders_apart(self) -> bool:
        return False

    def token_name(self, token_id: int) -> str:
        return self.codec.token_name(token_id)

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        room: Room | None = None,
    ) -> list[int]:
        if self.template is None:
            raise InvalidRequest("this model has no chat template", "messages")
        text = self.template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=variables,
        )
        return self.encode(text, add_special_tokens=False, room=room)

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """A decoder for one answer."""
        return self.codec.stream(skip_special_tokens=skip_special_tokens)


class HubTokenizer(TemplatedTokenizer):
    """The tokenizer of a Hugging Face checkpoint in any of its forms, and its chat template.

    `config` is its `tokenizer_config.json`.
    """

    def __init__(
        self, directory: Path, eos_token_ids: frozenset[int] = frozenset(), *, may_stand_in: bool = False
    ) -> None:
        """Raises ModelNotServable where there is no usable tokenizer; one made up may stand in for none at all."""
        config_path = directory / "tokenizer_config.json"
        config: dict[str, Any] = json.loads(config_path.read_text()) if config_path.is_file() else {}
        if may_stand_in and not _has_tokenizer(directory):
            codec: Codec = JsonCodec(_numbered_words(directory))
            config = {"chat_template": _PLAIN_TEMPLATE}
        else:
            codec = read_codec(directory, config)
        self.directory, self.config = directory, config
        super().__init__(codec, read_chat_template(directory, config), eos_token_ids)


def _has_tokenizer(directory: Path) -> bool:
    forms = ("tokenizer.json", *_CONVERTIBLE)
    return any((directory / name).is_file() for name in forms) or find_tiktoken_file(directory) is not None


def require_tokenizer(directory: Path) -> None:
    """Raises ModelNotServable where there is none in any form."""
    if not _has_tokenizer(directory):
        raise _no_tokenizer(directory)


def _no_tokenizer(directory: Path) -> ModelNotServable:
    return ModelNotServable(f"{directory} holds no tokenizer.json, no tokenizer.model and no tiktoken file")


def _numbered_words(directory: Path) -> Tokenizer:
    """Words w0, w1, …, as many as config.json says: every id has a text, so that every token shows in a stream."""
    config = json.loads((directory / "config.json").read_text())
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise ModelNotServable(f"{directory}/config.json names no vocab_size to make up a tokenizer for")
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return words


def read_codec(directory: Path, config: Mapping[str, Any]) -> Codec:
    """By the form that is there, `tokenizer.json` before others. Raises ModelNotServable."""
    path = directory / "tokenizer.json"
    if path.is_file():
        return JsonCodec(Tokenizer.from_file(str(path)))
    if (tiktoken_file := find_tiktoken_file(directory)) is not None:
        return TiktokenCodec(tiktoken_file, config)
    if any((directory / name).is_file() for name in _CONVERTIBLE):
        return JsonCodec(Tokenizer.from_str(_converted(directory)))
    raise _no_tokenizer(directory)


def _converted(directory: Path) -> str:
    """The `tokenizer.json` of another form; made by another process, for it takes torch."""
    made = subprocess.run(
        [sys.executable, "-m", "loraplex.engines.native.tokenizer_conversion", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        raise ModelNotServable(made.stderr.strip().splitlines()[-1] if made.stderr.strip() else f"{directory}: failed")
    return made.stdout
