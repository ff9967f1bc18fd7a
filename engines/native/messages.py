"""What the engine's two processes say to each other: msgpack over one local socket.

The client's process sends commands, the worker's process sends reports. Each is a tagged struct, so a message is
decoded to exactly one of them or not at all.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import TypeAlias

import msgspec

from loraplex.config.settings import Settings
from loraplex.engines.protocol import (
    Adapter,
    AdapterCard,
    AdapterResidency,
    Embedding,
    EmbedRequest,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    Progress,
    TokenLogprobs,
)
from loraplex.engines.stats import EngineStats


class _Message(msgspec.Struct, frozen=True, tag=True):
    pass


class Configure(_Message, frozen=True):
    """The first command: what to load."""

    settings: Settings


class Submit(_Message, frozen=True):
    request: GenerateRequest


class Embed(_Message, frozen=True):
    request: EmbedRequest


class End(_Message, frozen=True):
    """Stop a request. `aborted`: its client left; otherwise its answer is complete (a stop string was met)."""

    request_id: str
    aborted: bool


class Inspect(_Message, frozen=True):
    call: int
    adapter: Adapter


class Load(_Message, frozen=True):
    call: int
    adapter: Adapter


class Unload(_Message, frozen=True):
    call: int
    adapter_id: str


class Pin(_Message, frozen=True):
    call: int
    adapter: Adapter
    pinned: bool


class GetResidency(_Message, frozen=True):
    call: int


class GetStats(_Message, frozen=True):
    call: int


class Hello(_Message, frozen=True):
    """The first report: the worker is connected and waits for Configure. `language`: of its own messages."""

    language: str = ""  # of a worker that knows none yet


class Loading(_Message, frozen=True):
    progress: Progress


class Ready(_Message, frozen=True):
    info: EngineInfo
    eos_token_ids: list[int]


class Failure(_Message, frozen=True):
    """An EngineError as `errors.to_wire` gives it."""

    kind: str
    message: str
    param: str | None


class StartFailed(_Message, frozen=True):
    failure: Failure


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One token of one request."""

    request_id: str
    token_id: int
    finish_reason: FinishReason | None
    num_cached_tokens: int
    queue_seconds: float
    logprobs: TokenLogprobs | None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Failed(msgspec.Struct, frozen=True, array_like=True):
    """The end of one request by its own error."""

    request_id: str
    failure: Failure


class Stepped(_Message, frozen=True):
    """Everything one step gave."""

    step: int
    tokens: list[Token]
    failed: list[Failed]
    embeddings: list[Embedding] = []


class Reply(_Message, frozen=True):
    """The answer to the command with this `call` number: at most one field is set."""

    call: int
    failure: Failure | None = None
    card: AdapterCard | None = None
    residency: list[AdapterResidency] | None = None
    stats: EngineStats | None = None


Command: TypeAlias = Configure | Submit | Embed | End | Inspect | Load | Unload | Pin | GetResidency | GetStats
Report: TypeAlias = Hello | Loading | Ready | StartFailed | Stepped | Reply


@cache
def language() -> str:
    """A digest of every message's form: two processes understand each other where it is the same."""
    forms = msgspec.json.schema_components([Command, Report])
    return hashlib.sha256(msgspec.json.encode(forms, order="deterministic")).hexdigest()


encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
