"""/admin/v1/adapters: register, list, show, delete."""

from typing import Any

from litestar import Request, Response, delete, get, post
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from loraplex.auth.tenants import Tenants
from loraplex.engines.protocol import AdapterCard, Engine
from loraplex.gateway.audit import tell_audit, without_credentials
from loraplex.gateway.catalogue import SHARED, Catalogue, Registered
from loraplex.gateway.decoding import Body
from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.guards import require_admin
from loraplex.gateway.replies import json_reply


class NewAdapter(Struct, forbid_unknown_fields=True):
    """`source` is a local path, `hf://org/name[@revision]`, `s3://bucket/prefix` or an https archive.

    `tenant_id` limits the adapter to one tenant; null shares it with all. `base` may name the base it was made for.
    """

    name: str
    source: str
    base: str | None = None
    tenant_id: str | None = None


class AdapterView(Struct, kw_only=True):
    """An adapter as operators see it. `tier` is where the engine has it now; `num_requests` name it right now."""

    name: str
    base: str
    tenant_id: str | None
    source: str
    revision: str
    adapter_id: str
    num_bytes: int
    created_at: float
    card: AdapterCard
    tier: str = "disk"
    pinned: bool = False
    num_requests: int = 0


class AdapterList(Struct):
    data: list[AdapterView]


_new_adapter = Body(NewAdapter)


def adapter_routes(catalogue: Catalogue, tenants: Tenants, engine: Engine) -> list[HTTPRouteHandler]:
    """The handlers of this resource. A tenant's adapter is addressed with the query `?tenant_id=`."""

    async def views(entries: list[Registered]) -> list[AdapterView]:
        residency = {found.adapter_id: found for found in await engine.residency()}
        shown = []
        for entry in entries:
            view = _view(entry, catalogue.base)
            if (found := residency.get(entry.adapter_id)) is not None:
                view.tier, view.pinned, view.num_requests = found.tier, found.pinned, found.num_requests
            shown.append(view)
        return shown

    @post("/admin/v1/adapters", guards=[require_admin])
    async def register_adapter(request: Request[Any, Any, Any]) -> Response[bytes]:
        wanted = await _new_adapter.of(request)
        source = without_credentials(wanted.source)
        tell_audit(request, f"adapters/{wanted.name}", tenant_id=wanted.tenant_id, source=source)
        if wanted.base not in (None, catalogue.base):
            raise MalformedRequest(f"This server's base model is {catalogue.base!r}.", "base")
        if wanted.tenant_id is not None:
            await tenants.get_tenant(wanted.tenant_id)
        entry = await catalogue.register(wanted.name, wanted.source, wanted.tenant_id or SHARED)
        return json_reply(_view(entry, catalogue.base), 201)

    @get("/admin/v1/adapters", guards=[require_admin])
    async def list_adapters() -> Response[bytes]:
        return json_reply(AdapterList(await views(catalogue.everything())))

    @get("/admin/v1/adapters/{name:path}", guards=[require_admin])
    async def get_adapter(request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_reply((await views([catalogue.get(*_key(request))]))[0])

    @delete("/admin/v1/adapters/{name:path}", guards=[require_admin])
    async def delete_adapter(request: Request[Any, Any, Any]) -> None:
        tell_audit(request, tenant_id=_key(request)[0])
        await catalogue.remove(*_key(request))

    return [register_adapter, list_adapters, get_adapter, delete_adapter]


def _key(request: Request[Any, Any, Any]) -> tuple[str, str]:
    return request.query_params.get("tenant_id", SHARED), str(request.path_params["name"]).lstrip("/")


def _view(entry: Registered, base: str) -> AdapterView:
    return AdapterView(
        name=entry.name,
        base=base,
        tenant_id=entry.tenant_id or None,
        source=entry.source,
        revision=entry.revision,
        adapter_id=entry.adapter_id,
        num_bytes=entry.num_bytes,
        created_at=entry.created_at,
        card=entry.card,
    )
