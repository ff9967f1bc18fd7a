"""/v1/models and /v1/models/{id}: the base first, then the adapters the caller may use.

The list has what can be asked right now. A model may be shown by its name, in either way of writing a slash, or by
`name@version`, also while it arrives or after it failed. Deleting one is a matter of those who manage its tenant.
"""

from functools import partial
from typing import Any, Literal

from litestar import Request, Response, delete, get
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from loraplex.engines.protocol import Engine, HealthState
from loraplex.gateway.adapter_records import Registered, State, Version
from loraplex.gateway.admin.scope import scope_of
from loraplex.gateway.audit import tell_audit
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.errors import MalformedRequest, ModelNotFound
from loraplex.gateway.guards import caller_of, require_inference, require_tenant_admin
from loraplex.gateway.replies import json_reply


class AdapterVersion(Struct):
    """What of an adapter answers. `id` is the hash of its files, "" until they are here; `rank` is null till then."""

    version: int
    id: str
    rank: int | None


class ModelCard(Struct):
    """One model. `parent` and `root` as vLLM gives them: the base of an adapter, and where it came from.

    So does `max_model_len`, the most tokens of a prompt and its answer; null where no engine has started.
    `state` is the engine's for the base, the version's for an adapter. The base and routes have no `adapter`.
    """

    id: str
    created: int
    state: HealthState | State
    owned_by: str = "loraplex"
    object: Literal["model"] = "model"
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None
    adapter: AdapterVersion | None = None


class ModelList(Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class ModelDeleted(Struct):
    id: str
    deleted: Literal[True] = True
    object: Literal["model"] = "model"


def model_routes(catalogue: Catalogue, engine: Engine, started_at: int) -> list[HTTPRouteHandler]:
    """The handlers of this resource. `started_at` is the base's time of creation, in seconds since 1970."""
    base = catalogue.base

    def longest() -> int | None:
        return None if engine.health().state in ("starting", "failed") else engine.info().max_model_len

    def base_card() -> ModelCard:
        return ModelCard(base, started_at, engine.health().state, root=base, max_model_len=longest())

    @get("/v1/models", guards=[require_inference])
    async def list_models(request: Request[Any, Any, Any]) -> Response[bytes]:
        caller = caller_of(request)
        cards = [base_card()] if caller.policy.may_use(base) else []
        cards += [
            _card(entry.name, entry, None if entry.targets else entry.shown, base, longest())
            for entry in catalogue.visible(caller)
        ]
        return json_reply(ModelList(cards))

    @get("/v1/models/{name:path}", guards=[require_inference])
    async def retrieve_model(request: Request[Any, Any, Any]) -> Response[bytes]:
        name, caller = _name(request), caller_of(request)
        if name == base and caller.policy.may_use(base):
            return json_reply(base_card())
        found = catalogue.find(name, caller)
        if found is None:
            raise ModelNotFound(f"The model {name!r} does not exist or you do not have access to it.", "model")
        return json_reply(_card(name, *found, base, longest()))

    @delete("/v1/models/{name:path}", status_code=200, guards=[require_tenant_admin])
    async def delete_model(request: Request[Any, Any, Any]) -> Response[bytes]:
        """An adapter or a route; an admin's are the shared ones, or with `?tenant_id=` a tenant's."""
        key = scope_of(request), _name(request)
        tell_audit(request, f"adapters/{key[1]}", tenant_id=key[0])
        if key[1] == base:
            raise MalformedRequest("The base model cannot be deleted.", "model")
        if not catalogue.has(key):
            raise ModelNotFound(f"The model {key[1]!r} does not exist or is not yours to delete.", "model")
        await catalogue.remove(*key)
        return json_reply(ModelDeleted(key[1]))

    return [list_models, retrieve_model, delete_model]


def _name(request: Request[Any, Any, Any]) -> str:
    return str(request.path_params["name"]).lstrip("/")


def _card(shown_as: str, entry: Registered, version: Version | None, base: str, longest: int | None) -> ModelCard:
    """`version` is None for a route."""
    card = partial(ModelCard, parent=base, max_model_len=longest)
    if version is None:
        return card(shown_as, int(entry.created_at), "ready", root=base)
    adapter = AdapterVersion(version.number, version.adapter_id, version.card.rank if version.card else None)
    created = int(version.created_at if "@" in shown_as else entry.created_at)
    return card(shown_as, created, version.state, root=version.source, adapter=adapter)
