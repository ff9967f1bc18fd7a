"""/admin/v1/audit: who did what, newest first; a tenant's own admins see what was done to their tenant."""

from typing import Annotated, Any

import msgspec
from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from loraplex.auth.audit import AuditEntry, AuditFilter, AuditLog
from loraplex.auth.tenants import Tenants
from loraplex.gateway.decoding import Query
from loraplex.gateway.guards import require_admin, require_tenant_admin
from loraplex.gateway.replies import json_reply


class AuditPage(Struct):
    """`last_id`, given as `after`, leads to the next page while there `has_more`."""

    data: list[AuditEntry]
    has_more: bool
    last_id: int | None


class AuditQuery(AuditFilter, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The filter, and which page of what passes it."""

    after: int | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100


_query = Query(AuditQuery)


def audit_routes(audit: AuditLog, tenants: Tenants) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    @get("/admin/v1/audit", guards=[require_admin])
    async def list_audit(request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_reply(await _page(audit, _query.of(request)))

    @get("/admin/v1/tenants/{tenant_id:str}/audit", guards=[require_tenant_admin])
    async def list_tenant_audit(request: Request[Any, Any, Any]) -> Response[bytes]:
        tenant = await tenants.get_tenant(request.path_params["tenant_id"])
        return json_reply(await _page(audit, msgspec.structs.replace(_query.of(request), tenant_id=tenant.id)))

    return [list_audit, list_tenant_audit]


async def _page(audit: AuditLog, query: AuditQuery) -> AuditPage:
    found = await audit.find(query, query.limit + 1, query.after)
    data = found[: query.limit]
    return AuditPage(data, has_more=len(found) > len(data), last_id=data[-1].id if data else None)
