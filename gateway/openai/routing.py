"""The fields of a request that choose its model -> Route."""

from typing import Protocol

from loraplex.auth.caller import Caller
from loraplex.engines.errors import AdapterSourceForbidden
from loraplex.engines.protocol import WeightedAdapter
from loraplex.gateway.catalogue import Route
from loraplex.gateway.errors import MalformedRequest, ModelNotFound
from loraplex.gateway.openai.wire import GenerationFields
from loraplex.gateway.request_adapters import RequestAdapters, without_query


class ModelFields(Protocol):
    """What the body of any of these routes says of its model."""

    model: str
    adapter_source: str | None
    api_token: str | None
    user: str | None


async def route_of(body: ModelFields, caller: Caller, adapters: RequestAdapters) -> Route:
    """Where `model` leads. The body is left with the name that answers tell: without one the base's, never a signature.

    Raises ModelNotFound, and what `RequestAdapters.route` raises.
    """
    body.model = body.model or adapters.base
    route = await _said_by(body, body.model, caller, adapters)
    body.model = without_query(body.model)
    return route


async def composed_route_of(body: GenerationFields, caller: Caller, adapters: RequestAdapters) -> Route:
    """The same, or the composition that `adapters` asks for. Raises MalformedRequest too."""
    base = await route_of(body, caller, adapters)
    if body.adapters is None:
        return base
    if base.adapter is not None or base.composition:
        raise MalformedRequest(f"adapters compose on the base model; set model to {adapters.base!r}.", "model")
    parts = []
    for place, wanted in enumerate(body.adapters):
        found = (await _said_by(body, wanted.model, caller, adapters)).adapter
        if found is None:
            raise MalformedRequest(f"{wanted.model!r} is the base model, not an adapter.", f"adapters[{place}].model")
        parts.append(WeightedAdapter(found, wanted.weight))
    if len({part.adapter.id for part in parts}) < len(parts):
        raise MalformedRequest("Two of them are the same adapter; name it once.", "adapters")
    return adapters.composed(tuple(parts))


async def route_to(
    model: str | None,
    caller: Caller,
    adapters: RequestAdapters,
    *,
    source: str | None = None,
    token: str | None = None,
    user: str | None = None,
) -> Route:
    """As `RequestAdapters.route`; but what may not be fetched is no model, unless the request says where it is."""
    try:
        return await adapters.route(caller, adapter_id=model, adapter_source=source, api_token=token, user=user)
    except AdapterSourceForbidden as error:
        if source is not None:
            raise
        told = f"The model {model!r} does not exist or you do not have access to it. {error}"
        raise ModelNotFound(told, "model") from error


async def _said_by(body: ModelFields, model: str, caller: Caller, adapters: RequestAdapters) -> Route:
    return await route_to(model, caller, adapters, source=body.adapter_source, token=body.api_token, user=body.user)
