"""POST /v1/embeddings: texts or token ids -> vectors of the base or of an adapter."""

import base64
import secrets
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from litestar import Request
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp
from msgspec import UNSET, Raw, Struct, UnsetType

from loraplex.engines.protocol import Engine
from loraplex.gateway.decoding import Body
from loraplex.gateway.embedder import Embedder, Vector, Wanted
from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.guards import caller_of, inference_post
from loraplex.gateway.health import require_ready
from loraplex.gateway.openai.routing import route_of
from loraplex.gateway.openai.wire import Truncation, refuse_what_matters
from loraplex.gateway.prompts import prompts_of, room_of, tokenizer_for
from loraplex.gateway.request_adapters import RequestAdapters


class EmbeddingRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """`input` is a text, a list of texts, the token ids of one, or a list of those.

    `pooling` and `normalize` are ours; the settings say what holds without them. `user` always takes the same way of a
    weighted route, and has no other effect.
    """

    input: str | list[str | int | list[int]]
    model: str = ""
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1)] | None = None
    user: str | None = None
    adapter_source: str | None = None
    api_token: str | None = None
    pooling: Literal["mean", "last", "cls"] | None = None
    normalize: bool | None = None
    truncate_prompt_tokens: Truncation | None = None
    # vLLM's, known, not offered
    add_special_tokens: Raw | UnsetType = UNSET
    embed_dtype: Raw | UnsetType = UNSET
    endianness: Raw | UnsetType = UNSET
    messages: Raw | UnsetType = UNSET
    priority: Raw | UnsetType = UNSET
    truncation_side: Raw | UnsetType = UNSET
    use_activation: Raw | UnsetType = UNSET

    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {
        "add_special_tokens": (True,),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "messages": (),
        "priority": (0,),
        "truncation_side": ("left",),
        "use_activation": (),
    }


class EmbeddingObject(Struct):
    """Base64 is of little-endian float32s."""

    embedding: list[float] | str
    index: int
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct):
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


_body = Body(EmbeddingRequest)


def embedding_routes(engine: Engine, adapters: RequestAdapters, embedder: Embedder) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    @inference_post("/v1/embeddings")
    async def create_embedding(request: Request[Any, Any, Any]) -> ASGIApp:
        body = await _body.of(request)
        refuse_what_matters(body, body.not_offered)
        caller = caller_of(request)
        route = await route_of(body, caller, adapters)
        require_ready(engine)
        width = engine.info().embedding_width
        if body.dimensions is not None and body.dimensions > width:
            raise MalformedRequest(f"This model's embeddings have {width} dimensions.", "dimensions")
        if body.truncate_prompt_tokens == 0:
            raise MalformedRequest("It is -1, or a number of tokens from 1.", "truncate_prompt_tokens")
        room = room_of(body.truncate_prompt_tokens, engine.info().max_model_len, 0)
        prompts = await prompts_of(request, body.input, await tokenizer_for(route, engine), engine, "input", room)
        wanted = Wanted(
            embedding_id=f"embd-{secrets.token_hex(12)}",
            model=adapters.label(body.model, caller),
            route=route,
            prompts=prompts,
            pooling=body.pooling,
            normalize=body.normalize,
            dimensions=body.dimensions,
        )
        total = sum(len(prompt) for prompt in prompts)
        return await embedder.embed(request, wanted, partial(_encoded, body, EmbeddingUsage(total, total)))

    return [create_embedding]


def _encoded(body: EmbeddingRequest, usage: EmbeddingUsage, vectors: list[Vector]) -> bytes:
    data = [_told(index, vector, body) for index, vector in enumerate(vectors)]
    return msgspec.json.encode(EmbeddingList(data, body.model, usage))


def _told(index: int, vector: Vector, body: EmbeddingRequest) -> EmbeddingObject:
    if body.encoding_format == "base64":
        return EmbeddingObject(base64.b64encode(vector.astype("<f4").tobytes()).decode(), index)
    return EmbeddingObject(vector.tolist(), index)
