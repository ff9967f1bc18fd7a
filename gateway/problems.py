"""Every exception class -> status, type and code: the one table of OpenAI-shaped errors."""

import logging
import math
from typing import Any, NamedTuple

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException

from loraplex.auth import errors as auth
from loraplex.engines import errors as engines
from loraplex.gateway import errors as gateway
from loraplex.gateway.audit import tell_audit_of_refusal
from loraplex.gateway.middleware import request_id_of

_log = logging.getLogger("loraplex.gateway")

_INVALID = "invalid_request_error"
_SERVER = "server_error"


class Row(NamedTuple):
    """How one class is told to a client. `retry_after` in seconds, where another try makes sense."""

    status: int
    type: str
    code: str
    retry_after: float | None = None


TABLE: dict[type[Exception], Row] = {
    gateway.GatewayError: Row(400, _INVALID, "invalid_request"),
    gateway.MalformedRequest: Row(400, _INVALID, "invalid_request"),
    gateway.NotJson: Row(400, _INVALID, "invalid_request"),
    gateway.UnsupportedEncoding: Row(415, _INVALID, "unsupported_encoding"),
    gateway.InvalidUserInput: Row(400, _INVALID, "invalid_request"),
    gateway.UnknownParameter: Row(400, _INVALID, "unknown_parameter"),
    gateway.UnsupportedParameter: Row(400, _INVALID, "unsupported_parameter"),
    gateway.ModelNotFound: Row(404, _INVALID, "model_not_found"),
    gateway.ModelNotAllowed: Row(403, _INVALID, "model_not_allowed"),
    gateway.ResponseNotFound: Row(404, _INVALID, "response_not_found"),
    gateway.PreviousResponseNotFound: Row(400, _INVALID, "previous_response_not_found"),
    gateway.ClientLeft: Row(499, _INVALID, "client_closed_request"),
    gateway.IdempotencyKeyInUse: Row(409, _INVALID, "idempotency_key_in_use", 1.0),
    gateway.IdempotencyKeyReused: Row(422, _INVALID, "idempotency_key_reused"),
    gateway.AdapterNotRegistered: Row(404, _INVALID, "adapter_not_found"),
    gateway.AdapterNotReady: Row(503, _SERVER, "adapter_not_ready", 1.0),
    gateway.AdapterFailed: Row(424, _INVALID, "adapter_failed"),
    gateway.AdapterNameTaken: Row(409, _INVALID, "name_taken"),
    gateway.PinsFull: Row(409, _INVALID, "pins_full"),
    gateway.NoSuchPage: Row(404, _INVALID, "not_found"),
    gateway.FileNotFound: Row(404, _INVALID, "file_not_found"),
    gateway.FileInUse: Row(409, _INVALID, "file_in_use"),
    gateway.FileTooLarge: Row(413, _INVALID, "file_too_large"),
    gateway.StorageFull: Row(413, _INVALID, "storage_full"),
    gateway.BatchNotFound: Row(404, _INVALID, "batch_not_found"),
    gateway.BatchNotCancellable: Row(409, _INVALID, "batch_not_cancellable"),
    auth.AuthError: Row(401, _INVALID, "unauthorized"),
    auth.InvalidApiKey: Row(401, _INVALID, "invalid_api_key"),
    auth.KeysUnavailable: Row(503, _SERVER, "keys_unavailable", 1.0),
    auth.NotAllowed: Row(403, _INVALID, "not_allowed"),
    auth.AddressNotAllowed: Row(403, _INVALID, "address_not_allowed"),
    auth.TenantNotFound: Row(404, _INVALID, "tenant_not_found"),
    auth.KeyNotFound: Row(404, _INVALID, "key_not_found"),
    auth.LimitReached: Row(429, "requests", "rate_limit_exceeded"),
    auth.RequestsLimited: Row(429, "requests", "rate_limit_exceeded"),
    auth.TokensLimited: Row(429, "tokens", "rate_limit_exceeded"),
    auth.QuotaSpent: Row(429, "insufficient_quota", "insufficient_quota"),
    auth.LimitsUnavailable: Row(503, _SERVER, "limits_unavailable", 1.0),
    auth.UsageUnrecorded: Row(503, _SERVER, "usage_unrecorded", 1.0),
    auth.SecretNotFound: Row(404, _INVALID, "secret_not_found"),
    auth.LastAdminKey: Row(409, _INVALID, "last_admin_key"),
    auth.SecretUnreadable: Row(500, _SERVER, "secret_unreadable"),
    auth.NameTaken: Row(409, _INVALID, "name_taken"),
    engines.EngineError: Row(500, _SERVER, "engine_error"),
    engines.InvalidRequest: Row(400, _INVALID, "invalid_request"),
    engines.PromptTooLong: Row(400, _INVALID, "context_length_exceeded"),
    engines.AdapterError: Row(400, _INVALID, "adapter_error"),
    engines.AdapterNotFound: Row(404, _INVALID, "adapter_source_not_found"),
    engines.AdapterInvalid: Row(400, _INVALID, "adapter_invalid"),
    engines.AdapterUnsupported: Row(400, _INVALID, "adapter_unsupported"),
    engines.AdapterMismatch: Row(400, _INVALID, "adapter_mismatch"),
    engines.AdapterTooLarge: Row(400, _INVALID, "adapter_too_large"),
    engines.DiskCacheFull: Row(503, _SERVER, "disk_cache_full", 5.0),
    engines.NoRoomBesidePins: Row(409, _INVALID, "no_room_beside_pins"),
    engines.AdapterSourceForbidden: Row(403, _INVALID, "adapter_source_forbidden"),
    engines.AdapterSourceUnavailable: Row(503, _SERVER, "adapter_source_unavailable", 5.0),
    engines.AdapterChanged: Row(424, _INVALID, "adapter_changed"),
    engines.AdapterInUse: Row(409, _INVALID, "adapter_in_use"),
    engines.EngineUnavailable: Row(503, _SERVER, "engine_unavailable", 1.0),
    engines.EngineOverloaded: Row(503, _SERVER, "engine_overloaded", 1.0),
    engines.DeadlineExceeded: Row(504, _SERVER, "deadline_exceeded"),
    engines.EngineDied: Row(500, _SERVER, "engine_died", 1.0),
    engines.GenerationFailed: Row(500, _SERVER, "generation_failed"),
    engines.ModelNotServable: Row(500, _SERVER, "model_not_servable"),
}

_MOST_CHARACTERS = 2000  # of a message: it may repeat what a client sent, however long
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class Problem(NamedTuple):
    """One error as a client sees it."""

    row: Row
    message: str
    param: str | None

    def body(self) -> bytes:
        """`{"error": {message, type, param, code}}`."""
        error = {"message": self.message, "type": self.row.type, "param": self.param, "code": self.row.code}
        return msgspec.json.encode({"error": error})


UNFORESEEN = Problem(Row(500, _SERVER, "internal_error"), "The server had an error; it has been logged.", None)


def problem_of(error: Exception) -> Problem:
    """What to tell a client of this exception; an unforeseen one tells nothing of its insides."""
    if isinstance(error, HTTPException) and error.status_code < 500:
        code = _HTTP_CODES.get(error.status_code, "invalid_request")
        return Problem(Row(error.status_code, _INVALID, code), error.detail, None)
    row = TABLE.get(type(error))
    if row is None:
        return UNFORESEEN
    message, param = str(error), getattr(error, "param", None)
    return Problem(row, _in_short(message), param if param is None else _in_short(param))


def _in_short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"


def report(request_id: str, error: Exception) -> None:
    """Log what is the server's fault, with its traceback where nobody foresaw it."""
    if problem_of(error).row.status >= 500:
        _log.error("request %s failed: %s", request_id, error, exc_info=None if type(error) in TABLE else error)


def respond(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Litestar's handler for every exception."""
    problem = problem_of(error)
    report(request_id_of(request), error)
    tell_audit_of_refusal(request, problem.row.code)
    headers = headers_of(error)
    return Response(problem.body(), status_code=problem.row.status, media_type="application/json", headers=headers)


def headers_of(error: Exception) -> dict[str, str]:
    """Whether and when another try makes sense, and what a request without a key lacked."""
    problem = problem_of(error)
    headers = {}
    retry_after = getattr(error, "retry_after", problem.row.retry_after)
    if retry_after is not None:
        headers["retry-after"] = f"{math.ceil(retry_after)}"
        headers["retry-after-ms"] = f"{math.ceil(retry_after * 1000)}"
    if getattr(error, "is_final", False):  # or SDKs try again, in vain
        headers["x-should-retry"] = "false"
    if problem.row.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers
