"""Exceptions -> vLLM's errors: OpenAI's fields, with vLLM's types, and the status as `code`."""

from typing import Any

import msgspec
from litestar import Request, Response

from loraplex.gateway.audit import tell_audit_of_refusal
from loraplex.gateway.errors import AdapterNameTaken, InvalidUserInput
from loraplex.gateway.middleware import request_id_of
from loraplex.gateway.problems import headers_of, problem_of, report

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    409: "ConflictError",
    429: "RateLimitError",
}


def respond_as_vllm(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Litestar's handler for every exception of these routes."""
    problem = problem_of(error)
    report(request_id_of(request), error)
    tell_audit_of_refusal(request, problem.row.code)
    status = 400 if isinstance(error, AdapterNameTaken) else problem.row.status
    kind = _TYPES.get(status, "InternalServerError")
    if isinstance(error, InvalidUserInput | AdapterNameTaken):
        kind = "InvalidUserInput"
    told = {"message": problem.message, "type": kind, "param": problem.param, "code": status}
    body = msgspec.json.encode({"error": told})
    return Response(body, status_code=status, media_type="application/json", headers=headers_of(error))
