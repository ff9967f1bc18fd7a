"""/admin/v1/adapters: registered, updated, rolled back, moved between tiers, deleted; by admins and tenants' own.

An admin names a tenant's adapter with the query `?tenant_id=`; without it, a shared one. Whoever manages a tenant sees
and changes that tenant's alone, others look nonexistent.
"""

import contextlib
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, delete, get, patch, post
from litestar.handlers import HTTPRouteHandler
from msgspec import UNSET, Struct, UnsetType

from loraplex.auth.tenants import Tenants
from loraplex.engines.errors import EngineError, EngineUnavailable
from loraplex.engines.protocol import Engine
from loraplex.gateway.adapter_records import Key, Registered
from loraplex.gateway.admin.adapter_views import AdapterList, AdapterView, VersionList, listed_versions, view_of
from loraplex.gateway.admin.scope import own_or_named, require_fetchable, scope_of
from loraplex.gateway.audit import tell_audit, without_credentials
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.decoding import Body, Query
from loraplex.gateway.errors import AdapterNotRegistered, MalformedRequest, PinsFull
from loraplex.gateway.guards import caller_of, require_tenant_admin
from loraplex.gateway.replies import json_reply
from loraplex.gateway.uploads import receive_upload

_ADAPTERS = "/admin/v1/adapters"
_ADAPTER = _ADAPTERS + "/{name:path}"


class NewAdapter(Struct, forbid_unknown_fields=True):
    """`source` is a local path, `hf://org/name[@revision]`, `s3://bucket/prefix` or an https archive.

    `tenant_id` limits the adapter to one tenant; null shares it with all. `base` may name the base it was made for.
    Without `wait` the answer comes before the files do.
    """

    name: str
    source: str
    base: str | None = None
    tenant_id: str | None = None
    wait: bool = True
    pinned: bool = False


class AdapterChange(Struct, forbid_unknown_fields=True):
    """`source` makes a new version, of the same source too; `pinned` keeps the current one on the device."""

    source: str | UnsetType = UNSET
    pinned: bool | UnsetType = UNSET
    wait: bool = True


class Examined(Struct, forbid_unknown_fields=True):
    """An adapter that is not to be registered."""

    source: str
    tenant_id: str | None = None


class AdapterQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """`tenant_id` keeps to one tenant's. `after` is a page's `last_id`; without `limit` the page is all there are."""

    tenant_id: str | None = None
    after: str | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None


class ChosenVersion(Struct, forbid_unknown_fields=True):
    """A version's number, or the first 8 or more digits of its content's hash."""

    version: int | str | None = None


_new_adapter = Body(NewAdapter)
_change = Body(AdapterChange)
_examined = Body(Examined)
_chosen = Body(ChosenVersion)
_query = Query(AdapterQuery)


class _Shown:
    """Adapters as the API shows them."""

    def __init__(self, catalogue: Catalogue, engine: Engine) -> None:
        self._catalogue = catalogue
        self._engine = engine

    async def views(self, entries: list[Registered]) -> list[AdapterView]:
        residency = {}
        with contextlib.suppress(EngineUnavailable):  # the catalogue can be read without an engine
            residency = {found.adapter_id: found for found in await self._engine.residency()}
        return [view_of(entry, self._catalogue, residency) for entry in entries]

    async def reply(self, entry: Registered, status: int = 200) -> Response[bytes]:
        return json_reply((await self.views([entry]))[0], status)


def adapter_routes(
    catalogue: Catalogue, tenants: Tenants, engine: Engine, upload_seconds: float
) -> list[HTTPRouteHandler]:
    """The handlers of this resource. An upload may take `upload_seconds`."""
    shown = _Shown(catalogue, engine)
    return [
        *_arrival_routes(catalogue, tenants, shown, upload_seconds),
        *_reading_routes(catalogue, shown),
        *_change_routes(catalogue, shown),
    ]


def _arrival_routes(
    catalogue: Catalogue, tenants: Tenants, shown: _Shown, upload_seconds: float
) -> list[HTTPRouteHandler]:
    """How adapters come: from a source, or as files."""

    @post(_ADAPTERS, guards=[require_tenant_admin])
    async def register_adapter(request: Request[Any, Any, Any]) -> Response[bytes]:
        wanted = await _new_adapter.of(request)
        tell_audit(request, f"adapters/{wanted.name}", source=without_credentials(wanted.source))
        tenant_id = await own_or_named(caller_of(request), wanted.tenant_id, tenants)
        tell_audit(request, tenant_id=tenant_id)
        if wanted.base not in (None, catalogue.base):
            raise MalformedRequest(f"This server's base model is {catalogue.base!r}.", "base")
        if wanted.pinned and not wanted.wait:
            raise MalformedRequest("What is not waited for can be pinned once it is ready.", "pinned")
        await require_fetchable(caller_of(request), wanted.source, catalogue)
        entry = await catalogue.register(wanted.name, wanted.source, tenant_id, waits=wanted.wait)
        if wanted.pinned:
            try:
                entry = await catalogue.pin(entry.key, pinned=True)
            except (PinsFull, EngineError):
                await catalogue.remove(*entry.key, drains=True)
                raise
        return await shown.reply(entry, 201 if wanted.wait else 202)

    @post(f"{_ADAPTERS}/validate", status_code=200, guards=[require_tenant_admin])
    async def validate_adapter(request: Request[Any, Any, Any]) -> Response[bytes]:
        """What registering would find; nothing is registered."""
        wanted = await _examined.of(request)
        tell_audit(request, source=without_credentials(wanted.source))
        tenant_id = await own_or_named(caller_of(request), wanted.tenant_id, tenants)
        tell_audit(request, tenant_id=tenant_id)
        await require_fetchable(caller_of(request), wanted.source, catalogue)
        return json_reply(listed_versions([await catalogue.validate(wanted.source, tenant_id)], None)[0])

    @post(f"{_ADAPTERS}/upload", guards=[require_tenant_admin], request_max_body_size=None)
    async def upload_adapter(request: Request[Any, Any, Any]) -> Response[bytes]:
        """Files instead of a source: a new adapter, with `update=true` a new version, with `dry_run=true` neither."""
        name = request.query_params.get("name", "")
        is_update, is_dry = _flag(request, "update"), _flag(request, "dry_run")
        if is_update:
            key = scope_of(request), name
            _adapter(catalogue, key)
        else:
            caller, asked = caller_of(request), request.query_params.get("tenant_id")
            key = await own_or_named(caller, asked, tenants), name
        tell_audit(request, f"adapters/{name}", tenant_id=key[0])
        if not is_update and not is_dry:
            catalogue.require_free(key)
        with catalogue.store.receive() as upload:
            source = await receive_upload(request, upload, upload_seconds)
            if is_dry:
                return json_reply(listed_versions([await catalogue.validate(source, key[0])], None)[0])
            waits = _flag(request, "wait", default="true")
            act = catalogue.update(key, source, waits=waits) if is_update else None
            entry = await (act or catalogue.register(name, source, key[0], waits=waits))
        return await shown.reply(entry, 202 if not waits else 200 if is_update else 201)

    return [register_adapter, validate_adapter, upload_adapter]


def _reading_routes(catalogue: Catalogue, shown: _Shown) -> list[HTTPRouteHandler]:
    @get(_ADAPTERS, guards=[require_tenant_admin])
    async def list_adapters(request: Request[Any, Any, Any]) -> Response[bytes]:
        query, tenant_id = _query.of(request), scope_of(request, default=None)
        found = [entry for entry in catalogue.everything() if entry.targets is None]
        found = _behind([entry for entry in found if tenant_id in (None, entry.tenant_id)], query.after)
        page = found[: query.limit]
        last_id = _cursor(page[-1]) if page else None
        return json_reply(AdapterList(await shown.views(page), has_more=len(found) > len(page), last_id=last_id))

    @get(_ADAPTER, guards=[require_tenant_admin])
    async def get_adapter(request: Request[Any, Any, Any]) -> Response[bytes]:
        tenant_id, name = _key(request)
        head, _, last = name.rpartition("/")
        if last == "versions" and head and not catalogue.has((tenant_id, name)):
            entry = catalogue.get(tenant_id, head)
            return json_reply(VersionList(listed_versions(entry.versions, entry.current_version)))
        return await shown.reply(_adapter(catalogue, (tenant_id, name)))

    return [list_adapters, get_adapter]


def _change_routes(catalogue: Catalogue, shown: _Shown) -> list[HTTPRouteHandler]:
    """What can be done to an adapter that is registered."""
    actions: dict[str, Callable[[Request[Any, Any, Any], Key], Awaitable[tuple[Registered, int]]]] = {
        "rollback": lambda request, key: _roll_back(catalogue, request, key),
        "retry": lambda request, key: _retry(catalogue, request, key),
        "pin": lambda request, key: _done(catalogue.pin(key, pinned=True)),
        "unpin": lambda request, key: _done(catalogue.pin(key, pinned=False)),
        "warm": lambda request, key: _done(catalogue.warm(key)),
        "evict": lambda request, key: _done(catalogue.evict(key)),
    }

    @patch(_ADAPTER, guards=[require_tenant_admin])
    async def change_adapter(request: Request[Any, Any, Any]) -> Response[bytes]:
        key, wanted = _key(request), await _change.of(request)
        said = {} if wanted.source is UNSET else {"source": without_credentials(wanted.source)}
        tell_audit(request, tenant_id=key[0], **said)
        entry = _adapter(catalogue, key)
        if wanted.source is UNSET and wanted.pinned is UNSET:
            raise MalformedRequest("Say a source for a new version, or pinned.", "source")
        if wanted.source is not UNSET:
            await require_fetchable(caller_of(request), wanted.source, catalogue)
            entry = await catalogue.update(key, wanted.source, waits=wanted.wait)
        if wanted.pinned is not UNSET:
            entry = await catalogue.pin(key, pinned=wanted.pinned)
        return await shown.reply(entry, 200 if wanted.wait else 202)

    @post(_ADAPTER, guards=[require_tenant_admin])
    async def act_on_adapter(request: Request[Any, Any, Any]) -> Response[bytes]:
        tenant_id, name = _key(request)
        name, _, verb = name.rpartition("/")
        tell_audit(request, tenant_id=tenant_id)
        if (action := actions.get(verb)) is None or not name:
            raise AdapterNotRegistered(f"What can be done to an adapter: {', '.join(actions)}.", "name")
        _adapter(catalogue, (tenant_id, name))
        return await shown.reply(*await action(request, (tenant_id, name)))

    @delete(_ADAPTER, guards=[require_tenant_admin])
    async def delete_adapter(request: Request[Any, Any, Any]) -> None:
        key = _key(request)
        tell_audit(request, tenant_id=key[0])
        _adapter(catalogue, key)
        await catalogue.remove(*key, drains=_flag(request, "drain"))

    return [change_adapter, act_on_adapter, delete_adapter]


def _cursor(entry: Registered) -> str:
    """Its place in a list: adapters of several tenants may have one name."""
    return f"{entry.tenant_id}/{entry.name}"


def _behind(entries: list[Registered], after: str | None) -> list[Registered]:
    """Those behind a cursor. Raises AdapterNotRegistered where nothing of them is there."""
    if after is None:
        return entries
    places = [number for number, entry in enumerate(entries, start=1) if _cursor(entry) == after]
    if not places:
        raise AdapterNotRegistered(f"There is no adapter {after!r} to go on after.", "after")
    return entries[places[0] :]


async def _done(change: Awaitable[Registered]) -> tuple[Registered, int]:
    return await change, 200


async def _roll_back(catalogue: Catalogue, request: Request[Any, Any, Any], key: Key) -> tuple[Registered, int]:
    chosen = await _chosen_version(request)
    return await catalogue.roll_back(key, chosen), 200


async def _retry(catalogue: Catalogue, request: Request[Any, Any, Any], key: Key) -> tuple[Registered, int]:
    chosen = await _chosen_version(request)
    if chosen is not None and not chosen.isdecimal():
        raise MalformedRequest("Say the version's number.", "version")
    return await catalogue.retry(key, None if chosen is None else int(chosen)), 202


async def _chosen_version(request: Request[Any, Any, Any]) -> str | None:
    """The version in the body; no body names none."""
    raw = await request.body()
    chosen = _chosen.decode(raw).version if raw.strip() else None
    return None if chosen is None else str(chosen)


def _key(request: Request[Any, Any, Any]) -> Key:
    return scope_of(request), str(request.path_params["name"]).lstrip("/")


def _adapter(catalogue: Catalogue, key: Key) -> Registered:
    """Raises AdapterNotRegistered, also for a route."""
    entry = catalogue.get(*key)
    if entry.targets is not None:
        raise AdapterNotRegistered(f"There is no adapter {key[1]!r}; it is a route.", "name")
    return entry


def _flag(request: Request[Any, Any, Any], name: str, default: str = "false") -> bool:
    value = request.query_params.get(name, default)
    if value not in ("true", "false"):
        raise MalformedRequest(f"{name} is true or false.", name)
    return bool(value == "true")
