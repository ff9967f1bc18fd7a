"""Every action of the admin API is written down: begun by the guard that lets it in, ended before it is answered.

Handlers need do nothing for it. One that knows better what it acted on than its path says, or what of the request is
worth keeping, tells it with `tell_audit`; a secret is never among it.
"""

import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec
from litestar import Request
from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler
from msgspec import Struct

from loraplex.auth.audit import OK, AuditEntry, AuditLog
from loraplex.auth.caller import Caller
from loraplex.gateway.middleware import before_answer

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")
_TENANT_ID = re.compile(r"tenant_[0-9a-f]{16}")
_PREFIX = "/admin/v1/"


class _Action:
    """What is known of the action that a request is."""

    def __init__(self, audit: AuditLog, number: int) -> None:
        self._audit = audit
        self._number = number
        self.object: str | None = None
        self.tenant_id: str | None = None
        self.details: dict[str, Any] | None = None
        self.code: str | None = None

    async def end(self, status: int) -> None:
        """It is answered with this status."""
        outcome = self.code or (OK if status < 400 else str(status))
        await self._audit.end(self._number, status, outcome, self.object, self.tenant_id, self.details)


async def begin_action(
    connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler, caller: Caller
) -> None:
    """An admin action is let in; reading is none. Raises SQLAlchemyError where it cannot be written down."""
    if connection.scope["method"] in _READS:  # type: ignore[typeddict-item]
        return
    audit: AuditLog = connection.app.state.audit
    tenant_id = str(connection.path_params.get("tenant_id", ""))
    entry = AuditEntry(
        key_id=caller.key_id,
        role=caller.role,
        action=handler.handler_name.rpartition(".")[2],
        object=_printable(connection.scope["path"].removeprefix(_PREFIX)),
        tenant_id=tenant_id if _TENANT_ID.fullmatch(tenant_id) else "",
        address=connection.client.host[:64] if connection.client else "",
        request_id=str(connection.scope.get("request_id", "-")),
    )
    action = _Action(audit, await audit.begin(entry))
    connection.scope["admin_action"] = action  # type: ignore[typeddict-unknown-key]
    before_answer(connection.scope, action.end)


def tell_audit(
    request: Request[Any, Any, Any], object: str | None = None, *, tenant_id: str | None = None, **details: Any
) -> None:
    """What was acted on, as a path below /admin/v1, and what is worth keeping; JSON, and no secret."""
    action: _Action | None = request.scope.get("admin_action")  # type: ignore[assignment]
    if action is None:
        return
    if object is not None:
        action.object = _printable(object)
    if tenant_id is not None and _TENANT_ID.fullmatch(tenant_id):
        action.tenant_id = tenant_id
    action.details = {**(action.details or {}), **details}


def told(value: Struct) -> dict[str, Any]:
    """What of a body was said: its fields that are not at their defaults."""
    said = {}
    for field in msgspec.structs.fields(value):
        found = getattr(value, field.name)
        if found != field.default:
            said[field.name] = told(found) if isinstance(found, Struct) else found
    return said


def without_credentials(source: str) -> str:
    """An adapter's source as it may be kept: no user and password, and no query, where signatures are."""
    try:
        parts = urlsplit(source)
    except ValueError:
        return "?"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def tell_audit_of_refusal(request: Request[Any, Any, Any], code: str) -> None:
    """The error's code that the client is told."""
    action: _Action | None = request.scope.get("admin_action")  # type: ignore[assignment]
    if action is not None:
        action.code = code


def _printable(text: str) -> str:
    """PostgreSQL holds no NUL, and a log no line breaks."""
    return _UNPRINTABLE.sub("?", text)
