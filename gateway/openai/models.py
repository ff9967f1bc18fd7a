"""GET /v1/models and /v1/models/{id}: the base first, then the adapters the caller may use."""

from typing import Any, Literal

from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from loraplex.gateway.adapter_records import Registered
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.errors import ModelNotFound
from loraplex.gateway.guards import caller_of, require_inference
from loraplex.gateway.replies import json_reply


class ModelCard(Struct):
    """One model. `parent` and `root` as vLLM gives them: the base of an adapter, and where it came from."""

    id: str
    created: int
    owned_by: str = "loraplex"
    object: Literal["model"] = "model"
    root: str | None = None
    parent: str | None = None


class ModelList(Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"


def model_routes(catalogue: Catalogue, started_at: int) -> list[HTTPRouteHandler]:
    """The handlers of this resource. `started_at` is the base's time of creation, in seconds since 1970."""

    def cards(request: Request[Any, Any, Any]) -> list[ModelCard]:
        caller = caller_of(request)
        base = ModelCard(id=catalogue.base, created=started_at, root=catalogue.base)
        adapters = [_card(entry, catalogue.base) for entry in catalogue.visible(caller)]
        return [base, *adapters] if caller.policy.may_use(catalogue.base) else adapters

    @get("/v1/models", guards=[require_inference])
    async def list_models(request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_reply(ModelList(data=cards(request)))

    @get("/v1/models/{name:path}", guards=[require_inference])
    async def retrieve_model(request: Request[Any, Any, Any]) -> Response[bytes]:
        name = str(request.path_params["name"]).lstrip("/")
        card = next((card for card in cards(request) if card.id == name), None)
        if card is None:
            raise ModelNotFound(f"The model {name!r} does not exist or you do not have access to it.", "model")
        return json_reply(card)

    return [list_models, retrieve_model]


def _card(entry: Registered, base: str) -> ModelCard:
    return ModelCard(id=entry.name, created=int(entry.created_at), root=entry.source or base, parent=base)
