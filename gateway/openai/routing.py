"""The fields of a request that choose its model -> Route."""

from loraplex.auth.caller import Caller
from loraplex.engines.protocol import WeightedAdapter
from loraplex.gateway.catalogue import Catalogue, Route
from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.openai.wire import GenerationFields


async def route_of(body: GenerationFields, caller: Caller, catalogue: Catalogue) -> Route:
    """Where `model` leads, or the composition that `adapters` asks for.

    Raises MalformedRequest, and what `Catalogue.route` raises.
    """
    if body.adapters is None:
        return await catalogue.route(body.model, caller, user=body.user)
    base = await catalogue.route(body.model, caller)
    if base.adapter is not None or base.composition:
        raise MalformedRequest(f"adapters compose on the base model; set model to {catalogue.base!r}.", "model")
    parts = []
    for place, wanted in enumerate(body.adapters):
        found = (await catalogue.route(wanted.model, caller, user=body.user)).adapter
        if found is None:
            raise MalformedRequest(f"{wanted.model!r} is the base model, not an adapter.", f"adapters[{place}].model")
        parts.append(WeightedAdapter(found, wanted.weight))
    if len({part.adapter.id for part in parts}) < len(parts):
        raise MalformedRequest("Two of them are the same adapter; name it once.", "adapters")
    return catalogue.composed(tuple(parts))
