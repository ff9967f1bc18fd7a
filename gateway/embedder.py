"""Texts' tokens -> vectors, admitted, counted and settled like every request; nothing is generated for them."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from litestar import Request
from msgspec import Struct

from loraplex.auth.metering import Demand
from loraplex.config.settings import Model
from loraplex.engines.protocol import Embedding, EmbedRequest, Engine, Pooling
from loraplex.gateway.accounts import Accounts
from loraplex.gateway.catalogue import Route
from loraplex.gateway.clients import unless_client_leaves
from loraplex.gateway.guards import caller_of
from loraplex.gateway.holding import DiskTier, holding
from loraplex.gateway.idempotency import tell_meter
from loraplex.gateway.metrics import Metrics
from loraplex.gateway.middleware import request_id_of, tell_limits
from loraplex.gateway.openai.answers import computed_with
from loraplex.gateway.prompts import apart
from loraplex.gateway.replies import EncodedJson
from loraplex.gateway.sse import together

_MANY_NUMBERS = 16_384  # fewer are JSON in a few milliseconds, more in a thread


class Wanted(Struct, frozen=True, kw_only=True):
    """What is to be embedded. `pooling` and `normalize` where the client says them; `model` as it names it.

    Of each vector the first `dimensions` are kept, and normalised anew where it is normalised.
    """

    embedding_id: str
    model: str
    route: Route
    prompts: Sequence[Sequence[int]]
    pooling: Pooling | None = None
    normalize: bool | None = None
    dimensions: int | None = None


Vector: TypeAlias = npt.NDArray[np.float32]


class Embedder:
    """For all routes over one engine."""

    def __init__(
        self, engine: Engine, store: DiskTier, metrics: Metrics, accounts: Accounts, model: Model, at_once: int
    ) -> None:
        """Of one request's texts the engine has `at_once` at a time."""
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._accounts = accounts
        self._model = model
        self._at_once = at_once

    async def embed(
        self, request: Request[Any, Any, Any], wanted: Wanted, encode: Callable[[list[Vector]], bytes]
    ) -> EncodedJson:
        """What `encode` makes of a vector for each prompt, in order; of many it does so in a thread.

        Raises what the engine and the limits raise, and ClientLeft.
        """
        asked = self._requests(request, wanted)
        demand = _demand(request, wanted, asked)
        meter = await self._accounts.open(caller_of(request), demand, partial(tell_limits, request))
        tell_meter(request, meter)
        at_once = asyncio.Semaphore(self._at_once)

        async def one(wish: EmbedRequest) -> Embedding:
            async with at_once:
                return await self._engine.embed(wish)

        def told() -> bytes:
            return encode([_shortened(embedding.values, wanted.dimensions, asked[0]) for embedding in found])

        try:
            with self._metrics.counted(wanted.model, asked[0]), holding(self._store, asked[0].parts):
                with meter.working():
                    found = await unless_client_leaves(
                        request.scope, request.receive, together([one(wish) for wish in asked])
                    )
            meter.saw_prompts(sum(embedding.num_cached_tokens for embedding in found))
            is_long = sum(len(embedding.values) for embedding in found) > _MANY_NUMBERS
            encoding = apart(request, told, is_long=is_long, is_counted=False)  # it is already
            encoded = await unless_client_leaves(request.scope, request.receive, encoding)
        except BaseException as error:
            meter.settle(error)
            raise
        meter.settle()
        return EncodedJson(encoded)

    def _requests(self, request: Request[Any, Any, Any], wanted: Wanted) -> list[EmbedRequest]:
        caller = caller_of(request)
        pooling = self._model.embedding_pooling if wanted.pooling is None else wanted.pooling
        normalize = self._model.normalize_embeddings if wanted.normalize is None else wanted.normalize
        return [
            EmbedRequest(
                request_id=f"{wanted.embedding_id}-{place}",
                prompt_token_ids=tuple(prompt),
                pooling=pooling,
                normalize=normalize,
                adapter=wanted.route.adapter,
                composition=wanted.route.composition,
                tenant=caller.tenant_id,
                weight=caller.policy.weight,
                priority=caller.policy.priority,
                is_background=caller.is_background,
            )
            for place, prompt in enumerate(wanted.prompts)
        ]


def _shortened(values: Sequence[float], dimensions: int | None, asked: EmbedRequest) -> Vector:
    vector = np.asarray(values, np.float32)[:dimensions]
    if dimensions is None or not asked.normalize:
        return vector
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def _demand(request: Request[Any, Any, Any], wanted: Wanted, asked: Sequence[EmbedRequest]) -> Demand:
    return Demand(
        request_id=wanted.embedding_id,
        trace_id=request_id_of(request),
        route=request.scope["path"],
        model=wanted.model,
        adapter_id=computed_with(asked[0]),
        num_prompt_tokens=sum(len(wish.prompt_token_ids) for wish in asked),
        max_completion_tokens=0,
    )
