"""/admin/v1/tenants."""

from typing import Any

from litestar import Request, Response, delete, get, post
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from loraplex.auth.limits.policy import NO_LIMITS, Limits
from loraplex.auth.tenants import Tenant, Tenants
from loraplex.gateway.admin.keys import Name
from loraplex.gateway.admin.limits import checked
from loraplex.gateway.audit import tell_audit, told
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.decoding import Body
from loraplex.gateway.files.store import FileStore
from loraplex.gateway.guards import require_admin, require_tenant_admin
from loraplex.gateway.replies import json_reply


class NewTenant(Struct, forbid_unknown_fields=True):
    name: Name
    limits: Limits = NO_LIMITS


class TenantList(Struct):
    data: list[Tenant]


_new_tenant = Body(NewTenant)


def tenant_routes(tenants: Tenants, catalogue: Catalogue, files: FileStore) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    @post("/admin/v1/tenants", guards=[require_admin])
    async def create_tenant(request: Request[Any, Any, Any]) -> Response[bytes]:
        wanted = await _new_tenant.of(request)
        tenant = await tenants.create_tenant(wanted.name, checked(wanted.limits, "limits."))
        tell_audit(request, f"tenants/{tenant.id}", tenant_id=tenant.id, **told(wanted))
        return json_reply(tenant, 201)

    @get("/admin/v1/tenants", guards=[require_admin])
    async def list_tenants() -> Response[bytes]:
        return json_reply(TenantList(await tenants.list_tenants()))

    @get("/admin/v1/tenants/{tenant_id:str}", guards=[require_tenant_admin])
    async def get_tenant(request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_reply(await tenants.get_tenant(request.path_params["tenant_id"]))

    @delete("/admin/v1/tenants/{tenant_id:str}", guards=[require_admin])
    async def delete_tenant(request: Request[Any, Any, Any]) -> None:
        tenant_id = request.path_params["tenant_id"]
        await tenants.delete_tenant(tenant_id)
        await catalogue.let_go(tenant_id)
        await files.let_go(tenant_id)

    return [create_tenant, list_tenants, get_tenant, delete_tenant]
