"""/admin/v1/tenants/{tenant_id}/keys: made, shown, limited, rotated, revoked; by admins and the tenant's own."""

from typing import Annotated, Any

import msgspec
from litestar import Request, Response, delete, get, post, put
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from loraplex.auth.caller import KeyRole
from loraplex.auth.limits.policy import NO_LIMITS, Limits
from loraplex.auth.tenants import ApiKey, Tenants
from loraplex.gateway.admin.limits import LimitsView, checked, decode_limits
from loraplex.gateway.audit import tell_audit, told
from loraplex.gateway.decoding import Body
from loraplex.gateway.guards import require_tenant_admin
from loraplex.gateway.replies import json_reply

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]
_KEYS = "/admin/v1/tenants/{tenant_id:str}/keys"
_KEY = _KEYS + "/{key_id:str}"


class NewKey(Struct, forbid_unknown_fields=True):
    """`expires_at` in seconds since 1970; never if unset."""

    name: Name = "default"
    expires_at: float | None = None
    role: KeyRole = "inference"
    limits: Limits = NO_LIMITS


class Rotation(Struct, forbid_unknown_fields=True):
    """How long the old secret is good beside the new one: an hour unless said otherwise, at most 30 days."""

    overlap_seconds: Annotated[float, msgspec.Meta(ge=0, le=30 * 86400)] = 3600.0


class KeyList(Struct):
    data: list[ApiKey]


_new_key = Body(NewKey)
_rotation = Body(Rotation)


def key_routes(tenants: Tenants) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    def ids(request: Request[Any, Any, Any]) -> tuple[str, str]:
        return request.path_params["tenant_id"], request.path_params["key_id"]

    @post(_KEYS, guards=[require_tenant_admin])
    async def create_key(request: Request[Any, Any, Any]) -> Response[bytes]:
        wanted = await _new_key.of(request)
        limits = checked(wanted.limits, "limits.")
        tenant_id = request.path_params["tenant_id"]
        key = await tenants.create_key(tenant_id, wanted.name, wanted.expires_at, wanted.role, limits)
        tell_audit(request, f"tenants/{tenant_id}/keys/{key.id}", **told(wanted), last_four=key.last_four)
        return json_reply(key, 201)

    @get(_KEYS, guards=[require_tenant_admin])
    async def list_keys(request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_reply(KeyList(await tenants.list_keys(request.path_params["tenant_id"])))

    @get(_KEY, guards=[require_tenant_admin])
    async def get_key(request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_reply(await tenants.get_key(*ids(request)))

    @delete(_KEY, guards=[require_tenant_admin])
    async def revoke_key(request: Request[Any, Any, Any]) -> None:
        await tenants.revoke_key(*ids(request))

    @post(_KEY + "/rotate", status_code=200, guards=[require_tenant_admin])
    async def rotate_key(request: Request[Any, Any, Any]) -> Response[bytes]:
        wanted = await _rotation.of(request)
        tell_audit(request, **told(wanted))
        return json_reply(await tenants.rotate_key(*ids(request), wanted.overlap_seconds))

    @get(_KEY + "/limits", guards=[require_tenant_admin])
    async def get_key_limits(request: Request[Any, Any, Any]) -> Response[bytes]:
        tenant = await tenants.get_tenant(request.path_params["tenant_id"])
        key = await tenants.get_key(*ids(request))
        return json_reply(LimitsView(key.limits, key.limits.over(tenants.effective(tenant))))

    @put(_KEY + "/limits", guards=[require_tenant_admin])
    async def set_key_limits(request: Request[Any, Any, Any]) -> Response[bytes]:
        limits = await decode_limits(request)
        tell_audit(request, limits=told(limits))
        tenant = await tenants.get_tenant(request.path_params["tenant_id"])
        key = await tenants.set_key_limits(*ids(request), limits)
        return json_reply(LimitsView(key.limits, key.limits.over(tenants.effective(tenant))))

    return [create_key, list_keys, get_key, revoke_key, rotate_key, get_key_limits, set_key_limits]
