"""Who may pass: the API key of a request becomes its Caller before any handler runs."""

from typing import Any, Self

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.handlers import HTTPRouteHandler
from litestar.handlers.base import BaseRouteHandler
from litestar.types import Scope

from loraplex.auth.caller import Caller
from loraplex.auth.errors import AddressNotAllowed, InvalidApiKey, NotAllowed, TenantNotFound
from loraplex.auth.tenants import Tenants
from loraplex.gateway.audit import begin_action


class _UncopiedRoute(HTTPRouteHandler):
    """Litestar copies the handler for each guard of each request, which costs as much as the guard; ours only look."""

    def __copy__(self) -> Self:
        return self


async def require_inference(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """Any good key. Raises InvalidApiKey, or AddressNotAllowed."""
    await _identify(connection)


def inference_post(path: str | list[str], **options: Any) -> HTTPRouteHandler:
    """Decorates the handler of a POST route that any good key may use."""
    return _UncopiedRoute(path, http_method="POST", status_code=200, guards=[require_inference], **options)


async def require_admin(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """An admin key; what it does is audited. Raises InvalidApiKey, AddressNotAllowed or NotAllowed."""
    caller = await _identify(connection)
    if caller.role != "admin":
        raise NotAllowed("This needs an admin key.")
    await begin_action(connection, handler, caller)


async def require_tenant_admin(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """An admin key, or one that manages the tenant in the path; another tenant looks nonexistent.

    What it does is audited. Raises InvalidApiKey, AddressNotAllowed, NotAllowed or TenantNotFound.
    """
    caller = await _identify(connection)
    if caller.role == "inference":
        raise NotAllowed("This needs a key that manages the tenant, or an admin key.")
    tenant_id = connection.path_params.get("tenant_id")
    if caller.role != "admin" and tenant_id is not None and tenant_id != caller.tenant_id:
        raise TenantNotFound(f"There is no tenant {tenant_id!r}.")
    await begin_action(connection, handler, caller)


def caller_of(request: Request[Any, Any, Any]) -> Caller:
    """The caller a guard let in."""
    caller: Caller = request.scope["state"]["caller"]
    return caller


async def identify(connection: ASGIConnection[Any, Any, Any, Any], tenants: Tenants) -> Caller:
    """Who sends this request. Raises InvalidApiKey or AddressNotAllowed."""
    known: Caller | None = connection.scope["state"].get("caller")  # of a call inside the process; no client sets this
    if known is not None:
        return known
    header = next((value for name, value in connection.scope["headers"] if name == b"authorization"), None)
    caller = await tenants.authenticate(_bearer(header))
    if not caller.policy.admits(connection.client.host if connection.client else None):
        raise AddressNotAllowed("This key may not be used from this address.")
    return caller


def refuse_at_guard(scope: Scope, error: Exception) -> None:
    """Whatever route the request is for, its guard raises this, unless it has a reason of its own to."""
    scope["refusal"] = error  # type: ignore[typeddict-unknown-key]


async def _identify(connection: ASGIConnection[Any, Any, Any, Any]) -> Caller:
    caller = await identify(connection, connection.app.state.tenants)
    connection.scope["state"]["caller"] = caller
    refusal: Exception | None = connection.scope.get("refusal")  # type: ignore[assignment]
    if refusal is not None:
        raise refusal
    return caller


def _bearer(header: bytes | None) -> str | None:
    """Raises InvalidApiKey for a header that is something else."""
    if header is None:
        return None
    scheme, _, key = header.decode("latin-1").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise InvalidApiKey("The Authorization header must read `Bearer KEY`.")
    return key.strip()
