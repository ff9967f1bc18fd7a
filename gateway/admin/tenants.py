"""/admin/v1/tenants and their keys."""

from typing import Annotated, Any

import msgspec
from litestar import Request, Response, delete, get, post
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from loraplex.auth.tenants import ApiKey, Tenant, Tenants
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.decoding import Body
from loraplex.gateway.guards import require_admin
from loraplex.gateway.replies import json_reply

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]


class NewTenant(Struct, forbid_unknown_fields=True):
    name: Name


class NewKey(Struct, forbid_unknown_fields=True):
    """`expires_at` in seconds since 1970; never if unset."""

    name: Name = "default"
    expires_at: float | None = None


class TenantList(Struct):
    data: list[Tenant]


class KeyList(Struct):
    data: list[ApiKey]


_new_tenant = Body(NewTenant)
_new_key = Body(NewKey)


def tenant_routes(tenants: Tenants, catalogue: Catalogue) -> list[HTTPRouteHandler]:
    """The handlers of these resources."""

    @post("/admin/v1/tenants", guards=[require_admin])
    async def create_tenant(request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_reply(await tenants.create_tenant((await _new_tenant.of(request)).name), 201)

    @get("/admin/v1/tenants", guards=[require_admin])
    async def list_tenants() -> Response[bytes]:
        return json_reply(TenantList(await tenants.list_tenants()))

    @get("/admin/v1/tenants/{tenant_id:str}", guards=[require_admin])
    async def get_tenant(request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_reply(await tenants.get_tenant(request.path_params["tenant_id"]))

    @delete("/admin/v1/tenants/{tenant_id:str}", guards=[require_admin])
    async def delete_tenant(request: Request[Any, Any, Any]) -> None:
        tenant_id = request.path_params["tenant_id"]
        await tenants.delete_tenant(tenant_id)
        await catalogue.let_go(tenant_id)

    @post("/admin/v1/tenants/{tenant_id:str}/keys", guards=[require_admin])
    async def create_key(request: Request[Any, Any, Any]) -> Response[bytes]:
        wanted = await _new_key.of(request)
        return json_reply(
            await tenants.create_key(request.path_params["tenant_id"], wanted.name, wanted.expires_at), 201
        )

    @get("/admin/v1/tenants/{tenant_id:str}/keys", guards=[require_admin])
    async def list_keys(request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_reply(KeyList(await tenants.list_keys(request.path_params["tenant_id"])))

    @delete("/admin/v1/tenants/{tenant_id:str}/keys/{key_id:str}", guards=[require_admin])
    async def revoke_key(request: Request[Any, Any, Any]) -> None:
        await tenants.revoke_key(request.path_params["tenant_id"], request.path_params["key_id"])

    return [create_tenant, list_tenants, get_tenant, delete_tenant, create_key, list_keys, revoke_key]
