"""POST /embed."""

import secrets
from typing import Any

import msgspec
from litestar import Request
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp
from msgspec import Struct

from loraplex.engines.protocol import Engine
from loraplex.gateway.decoding import Body
from loraplex.gateway.embedder import Embedder, Vector, Wanted
from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.guards import caller_of, inference_post
from loraplex.gateway.health import require_ready
from loraplex.gateway.lorax.generate import label
from loraplex.gateway.lorax.problems import respond_flat
from loraplex.gateway.lorax.requests import tokens_of
from loraplex.gateway.request_adapters import MergedAdapters, RequestAdapters


class EmbedParameters(Struct, forbid_unknown_fields=True, kw_only=True):
    """Which adapter, and how much of the text; as in a generation."""

    adapter_id: str | None = None
    adapter_source: str | None = None
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = None
    truncate: int | None = None


class LoraxEmbedRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    inputs: str
    parameters: EmbedParameters | None = None
    stream: bool | None = None


class EmbedResponse(Struct):
    embeddings: list[float]


_body = Body(LoraxEmbedRequest)


def embed_routes(engine: Engine, adapters: RequestAdapters, embedder: Embedder) -> list[HTTPRouteHandler]:
    """The handler of this resource."""

    @inference_post("/embed", exception_handlers={Exception: respond_flat})
    async def embed(request: Request[Any, Any, Any]) -> ASGIApp:
        body = await _body.of(request)
        if body.stream:
            raise MalformedRequest("`stream` is for generated text", "stream")
        if not body.inputs:
            raise MalformedRequest("`inputs` cannot be empty", "inputs")
        said = body.parameters or EmbedParameters()
        if said.truncate is not None and said.truncate < 1:
            raise MalformedRequest("`truncate` must be strictly positive", "truncate")
        caller = caller_of(request)
        route = await adapters.route(
            caller,
            adapter_id=said.adapter_id,
            adapter_source=said.adapter_source,
            api_token=said.api_token,
            merged=said.merged_adapters,
        )
        require_ready(engine)
        wanted = Wanted(
            embedding_id=f"embed-{secrets.token_hex(12)}",
            model=label(said.adapter_id, said.merged_adapters, adapters, caller),
            route=route,
            prompts=[await tokens_of(request, body.inputs, route, engine, truncate=said.truncate)],
        )
        return await embedder.embed(request, wanted, _encoded)

    return [embed]


def _encoded(vectors: list[Vector]) -> bytes:
    return msgspec.json.encode(EmbedResponse(vectors[0].tolist()))
