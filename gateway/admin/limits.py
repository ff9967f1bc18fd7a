"""/admin/v1/tenants/{tenant_id}/limits: read, and replaced as a whole while requests run."""

from typing import Any

from litestar import Request, Response, get, put
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from loraplex.auth.limits.policy import Limits
from loraplex.auth.tenants import Tenants
from loraplex.gateway.audit import tell_audit, told
from loraplex.gateway.decoding import Body
from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.guards import require_admin, require_tenant_admin
from loraplex.gateway.replies import json_reply

_LIMITS = "/admin/v1/tenants/{tenant_id:str}/limits"


class LimitsView(Struct):
    """The limits set here, and what results from those inherited."""

    limits: Limits
    effective: Limits


_limits = Body(Limits)


def checked(limits: Limits, prefix: str = "") -> Limits:
    """Raises MalformedRequest for an address that is none."""
    try:
        limits.check()
    except ValueError as error:
        raise MalformedRequest(f"Invalid value for {prefix}allowed_ips: {error}", f"{prefix}allowed_ips") from error
    return limits


async def decode_limits(request: Request[Any, Any, Any]) -> Limits:
    """The body of a PUT. Raises MalformedRequest."""
    return checked(await _limits.of(request))


def limit_routes(tenants: Tenants) -> list[HTTPRouteHandler]:
    """The handlers of this resource; a tenant may see its limits, and only an admin may change them."""

    @get(_LIMITS, guards=[require_tenant_admin])
    async def get_limits(request: Request[Any, Any, Any]) -> Response[bytes]:
        tenant = await tenants.get_tenant(request.path_params["tenant_id"])
        return json_reply(LimitsView(tenant.limits, tenants.effective(tenant)))

    @put(_LIMITS, guards=[require_admin])
    async def set_limits(request: Request[Any, Any, Any]) -> Response[bytes]:
        limits = await decode_limits(request)
        tell_audit(request, limits=told(limits))
        tenant = await tenants.set_tenant_limits(request.path_params["tenant_id"], limits)
        return json_reply(LimitsView(tenant.limits, tenants.effective(tenant)))

    return [get_limits, set_limits]
