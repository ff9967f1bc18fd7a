"""/admin/v1/routes: names that lead to several adapters, each with a share of the requests."""

from typing import Annotated, Any

import msgspec
from litestar import Request, Response, delete, get, post, put
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from loraplex.auth.tenants import Tenants
from loraplex.gateway.adapter_records import Registered, Target
from loraplex.gateway.admin.scope import own_or_named, scope_of
from loraplex.gateway.audit import tell_audit
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.decoding import Body
from loraplex.gateway.errors import AdapterNotRegistered
from loraplex.gateway.guards import caller_of, require_tenant_admin
from loraplex.gateway.replies import json_reply

_ROUTES = "/admin/v1/routes"
_ROUTE = _ROUTES + "/{name:path}"


class Share(Struct, forbid_unknown_fields=True):
    """`model` is an adapter's name, or `name@version`; `weight` counts in proportion to the others'."""

    model: str
    weight: Annotated[float, msgspec.Meta(gt=0, le=1e6)]


Shares = Annotated[list[Share], msgspec.Meta(min_length=1, max_length=64)]


class NewRoute(Struct, forbid_unknown_fields=True):
    """`tenant_id` limits the route to one tenant; null shares it with all."""

    name: str
    targets: Shares
    tenant_id: str | None = None


class OtherTargets(Struct, forbid_unknown_fields=True):
    targets: Shares


class RouteView(Struct):
    name: str
    tenant_id: str | None
    targets: tuple[Target, ...]
    created_at: float
    last_used_at: float | None


class RouteList(Struct):
    data: list[RouteView]


_new_route = Body(NewRoute)
_other_targets = Body(OtherTargets)


def route_routes(catalogue: Catalogue, tenants: Tenants) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    def view(entry: Registered) -> RouteView:
        used = catalogue.last_used_at(entry)
        return RouteView(entry.name, entry.tenant_id or None, entry.targets or (), entry.created_at, used)

    def named(request: Request[Any, Any, Any]) -> Registered:
        name = str(request.path_params["name"]).lstrip("/")
        tenant_id = scope_of(request)
        tell_audit(request, tenant_id=tenant_id)
        if not catalogue.has((tenant_id, name)) or catalogue.get(tenant_id, name).targets is None:
            raise AdapterNotRegistered(f"There is no route {name!r}.", "name")
        return catalogue.get(tenant_id, name)

    @post(_ROUTES, guards=[require_tenant_admin])
    async def create_route(request: Request[Any, Any, Any]) -> Response[bytes]:
        wanted = await _new_route.of(request)
        tell_audit(request, f"routes/{wanted.name}", targets=msgspec.to_builtins(wanted.targets))
        tenant_id = await own_or_named(caller_of(request), wanted.tenant_id, tenants)
        tell_audit(request, tenant_id=tenant_id)
        return json_reply(view(await catalogue.add_route(wanted.name, _targets(wanted.targets), tenant_id)), 201)

    @get(_ROUTES, guards=[require_tenant_admin])
    async def list_routes(request: Request[Any, Any, Any]) -> Response[bytes]:
        tenant_id = scope_of(request, default=None)
        found = [entry for entry in catalogue.everything() if entry.targets is not None]
        return json_reply(RouteList([view(entry) for entry in found if tenant_id in (None, entry.tenant_id)]))

    @get(_ROUTE, guards=[require_tenant_admin])
    async def get_route(request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_reply(view(named(request)))

    @put(_ROUTE, guards=[require_tenant_admin])
    async def change_route(request: Request[Any, Any, Any]) -> Response[bytes]:
        entry, wanted = named(request), await _other_targets.of(request)
        tell_audit(request, targets=msgspec.to_builtins(wanted.targets))
        return json_reply(view(await catalogue.change_route(entry.key, _targets(wanted.targets))))

    @delete(_ROUTE, guards=[require_tenant_admin])
    async def delete_route(request: Request[Any, Any, Any]) -> None:
        await catalogue.remove(*named(request).key)

    return [create_route, list_routes, get_route, change_route, delete_route]


def _targets(shares: list[Share]) -> tuple[Target, ...]:
    return tuple(Target(share.model, share.weight) for share in shares)
