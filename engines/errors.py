"""What can go wrong in an engine, named for what happened.

Each class crosses the process boundary as its name and message (`to_wire`, `from_wire`), and the gateway maps
each to a status, a type and a code in one table (`gateway/problems.py`).
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of everything an engine raises on purpose; `str(error)` is fit for the client."""


class InvalidRequest(EngineError):
    """The request can never be served as it stands; `param` names the offending field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(InvalidRequest):
    """Prompt and requested tokens do not fit the model's context or the KV cache."""


class AdapterError(EngineError):
    """Base of what can be wrong with one adapter; never harms another request."""


class AdapterNotFound(AdapterError):
    """The source holds no such adapter."""


class AdapterInvalid(AdapterError):
    """The adapter's files are corrupt, hostile, or not what PEFT's LoRA writes."""


class AdapterUnsupported(AdapterError):
    """A well-formed adapter that uses a feature this engine refuses by name."""


class AdapterMismatch(AdapterError):
    """The adapter was made for another base model: names or shapes do not fit."""


class AdapterTooLarge(AdapterError):
    """The adapter exceeds a configured limit (rank, bytes, device room)."""


class DiskCacheFull(AdapterError):
    """Requests hold so much of the disk cache that the adapter does not fit beside it; worth another try."""


class NoRoomBesidePins(AdapterError):
    """Too little of the device is left beside the pinned adapters, until one of them is unpinned."""


class AdapterSourceForbidden(AdapterError):
    """The operator's settings do not allow this source."""


class AdapterSourceUnavailable(AdapterError):
    """The source did not answer, or broke off; worth another try."""


class AdapterChanged(AdapterError):
    """The source has other files by now than those that were asked for."""


class AdapterInUse(AdapterError):
    """The adapter serves requests right now, so it cannot be removed."""


class EngineUnavailable(EngineError):
    """No engine process is ready (starting, restarting, draining); worth another try."""


class EngineOverloaded(EngineError):
    """The queue is full, or the request waited too long in it; worth another try."""


class DeadlineExceeded(EngineError):
    """The request was not finished in the time it was given."""


class EngineDied(EngineError):
    """The engine process ended while this request was in flight."""


class GenerationFailed(EngineError):
    """This one request could not be computed (for instance non-finite logits)."""


class ModelNotServable(EngineError):
    """The base model cannot be loaded or carried by this engine; raised at start."""


def _tree(root: type[EngineError]) -> dict[str, type[EngineError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def to_wire(error: EngineError) -> tuple[str, str, str | None]:
    """(class name, message, param) of an error, to send to another process."""
    return type(error).__name__, str(error), error.param if isinstance(error, InvalidRequest) else None


def from_wire(kind: str, message: str, param: str | None) -> EngineError:
    """The error again; an unknown class name becomes its root."""
    cls = _tree(EngineError).get(kind, EngineError)
    return cls(message, param) if issubclass(cls, InvalidRequest) else cls(message)
