"""What an upstream says instead of an answer -> the error that it means here."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from loraplex.engines.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnsupported,
    DeadlineExceeded,
    EngineDied,
    EngineError,
    EngineOverloaded,
    EngineUnavailable,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
)

_MOST_CHARACTERS = 1000
_WORKER = re.compile(r"add_lora method failed: Worker failed with error '(.*)', please check", re.DOTALL)
_BY_CODE: dict[str, type[EngineError]] = {
    "engine_died": EngineDied,
    "deadline_exceeded": DeadlineExceeded,
    "engine_unavailable": EngineUnavailable,
    "engine_overloaded": EngineOverloaded,
}


class UnknownModel(Exception):
    """The upstream serves no model of that name, or none any more. Whoever asked loads it, or is EngineUnavailable."""


class Refusal(msgspec.Struct, frozen=True):
    """An error in OpenAI's shape. `is_shaped` unless the body was something else, as a proxy's or a framework's is."""

    status: int
    message: str
    param: str | None = None
    code: str = ""
    is_shaped: bool = True


def refusal_of(status: int, body: bytes) -> Refusal:
    """Of a whole answer that is no success."""
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said = None
    return refusal_in(said, status) or Refusal(status, f"status {status}", is_shaped=False)


def refusal_in(said: Any, status: int = 500) -> Refusal | None:
    """Of an answer, or of a frame of one that has begun; None where it tells no error."""
    error = said.get("error") if isinstance(said, dict) else None
    if isinstance(error, str):  # older ones, and their route for adapters
        error = {"message": error}
    elif error is None and isinstance(said, dict) and said.get("object") == "error":
        error = said
    if not isinstance(error, dict):
        return None
    param, code = error.get("param"), error.get("code")
    return Refusal(
        status=code if isinstance(code, int) and not isinstance(code, bool) else status,
        message=str(error.get("message") or f"status {status}")[:_MOST_CHARACTERS],
        param=param if isinstance(param, str) else None,
        code=code if isinstance(code, str) else "",
    )


def error_of(refusal: Refusal) -> EngineError | UnknownModel:
    """What it means for a request."""
    status, told = refusal.status, f"the upstream: {refusal.message}"
    if refusal.code in _BY_CODE:
        return _BY_CODE[refusal.code](told)
    match status:
        case 400 | 422:
            kind = PromptTooLong if refusal.code == "context_length_exceeded" else InvalidRequest
            return kind(refusal.message, refusal.param)
        case 401 | 403:
            return EngineUnavailable("the upstream does not accept this gateway's key")
        case 404:
            return UnknownModel(told)
        case 408 | 429 | 503:
            return EngineOverloaded(told)
        case 502 | 504:
            return EngineUnavailable(told)
    return GenerationFailed(told)


def adapter_error_of(refusal: Refusal) -> EngineError | UnknownModel:
    """What it means for an adapter that was to be loaded."""
    match refusal.status:
        case 404 | 405 if not refusal.is_shaped:
            return AdapterUnsupported(
                "the upstream loads no adapters while it runs; vLLM does with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            )
        case 404:
            return AdapterNotFound(f"the upstream: {refusal.message}")
        case 400 | 422:
            return AdapterInvalid(f"the upstream: {refusal.message}")
        case 409:
            return AdapterError(f"the upstream: {refusal.message}")
        case 500 if refusal.is_shaped and (found := _WORKER.search(refusal.message)):  # vLLM, of whatever it cannot use
            return AdapterUnsupported(f"the upstream: {found[1]}")
    return error_of(refusal)
