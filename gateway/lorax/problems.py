"""Exceptions -> LoRAX's flat errors, `{"error", "error_type"}`: its clients raise a class of their own for each type.

The statuses are those of the one table in `gateway/problems.py`, except where LoRAX's clients expect another. Where
LoRAX has no type, the status decides what its client raises.
"""

from typing import Any, NamedTuple

import msgspec
from litestar import Request, Response

from loraplex.auth import errors as auth
from loraplex.engines import errors as engines
from loraplex.gateway import errors as gateway
from loraplex.gateway.middleware import request_id_of
from loraplex.gateway.problems import headers_of, problem_of, report
from loraplex.gateway.sse import Framing


class Flat(NamedTuple):
    """How one class is told; `prefix` comes before its message."""

    status: int
    error_type: str
    prefix: str = ""


_GENERATION = Flat(424, "generation", "Request failed during generation: ")
_VALIDATION = Flat(422, "validation", "Input validation error: ")

_BY_CLASS: dict[type[Exception], Flat] = {
    gateway.NotJson: Flat(400, "bad_request"),
    gateway.UnsupportedParameter: Flat(422, "not_offered"),
    gateway.ModelNotFound: Flat(404, "adapter_not_found"),
    engines.AdapterNotFound: Flat(404, "adapter_not_found"),
    engines.AdapterError: _GENERATION,
    engines.GenerationFailed: _GENERATION,
    engines.EngineDied: Flat(500, "incomplete_generation", "Incomplete generation: "),
    engines.EngineOverloaded: Flat(429, "overloaded"),
    engines.EngineUnavailable: Flat(424, "not_ready"),  # its client's ShardNotReadyError
    auth.QuotaSpent: Flat(429, "overloaded"),  # in a stream as well, where only LoRAX's own types have a class
}
_BY_STATUS = {
    400: _VALIDATION,
    403: Flat(403, "validation"),  # without the type its client would take it for a server that is not ready
    429: Flat(429, "rate_limited"),
    503: Flat(503, "unavailable"),
    504: Flat(504, "timeout"),
}


def flat(error: Exception) -> Flat:
    """How this error is told."""
    problem = problem_of(error)
    if isinstance(error, engines.AdapterSourceForbidden):
        return _BY_STATUS[403]
    for kind in type(error).__mro__:
        if kind in _BY_CLASS:
            return _BY_CLASS[kind]
    return _BY_STATUS.get(problem.row.status, Flat(problem.row.status, problem.row.code))


def body_of(error: Exception) -> bytes:
    told = flat(error)
    return msgspec.json.encode({"error": told.prefix + problem_of(error).message, "error_type": told.error_type})


def respond_flat(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Litestar's handler for every exception of these routes."""
    report(request_id_of(request), error)
    headers = headers_of(error)
    return Response(body_of(error), status_code=flat(error).status, media_type="application/json", headers=headers)


def error_frame(error: Exception) -> bytes:
    """An error that comes after a stream has begun."""
    return b"data: " + body_of(error) + b"\n\n"


FRAMING = Framing(done=b"", error=error_frame)  # nothing follows the last token: clients would take it for JSON
