"""What an upstream is asked beside generations: how it is, what it serves, adapters, embeddings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from loraplex.config.settings import Settings
from loraplex.engines.errors import EngineError, EngineUnavailable, GenerationFailed, InvalidRequest, ModelNotServable
from loraplex.engines.protocol import Adapter, Embedding, EmbedRequest, EngineInfo
from loraplex.engines.upstream.description import OURS, base_among, described, served_models
from loraplex.engines.upstream.refusals import adapter_error_of, error_of
from loraplex.engines.upstream.server import Refused, Server
from loraplex.engines.upstream.wire import Usage

_EMBEDDINGS = "/v1/embeddings"

_log = logging.getLogger("loraplex.engine")


class _Vector(msgspec.Struct):
    embedding: list[float]


class _Vectors(msgspec.Struct):
    data: list[_Vector]
    usage: Usage | None = None


class Upstream:
    """One server and the base that it serves; `base` is that one's name there, from the first `look` on."""

    base = ""
    _is_ours = False

    def __init__(self, server: Server, settings: Settings) -> None:
        self._server, self._settings = server, settings

    async def ailment(self) -> str | None:
        """Why it cannot be asked anything; None where it can."""
        try:
            await self._server.get("/health")
        except Refused as refused:
            return f"the upstream's health: {refused.refusal.message}"
        except EngineError as error:
            return str(error)
        return None

    async def look(self) -> tuple[EngineInfo, frozenset[str]]:
        """What it serves, and the names of all its models. Raises ModelNotServable or EngineError."""
        models = served_models(await self._asked("/v1/models"))
        base = base_among(models, self._settings.upstream.model)
        self.base, self._is_ours = base.id, base.owned_by == OURS
        width = await self._embedding_width()
        host = urlsplit(self._server.url).netloc
        info = await asyncio.to_thread(described, self._settings, base, host, width)
        return info, frozenset(one.id for one in models)

    async def load(self, adapter: Adapter) -> None:
        """Raises AdapterError, or EngineError where the upstream is not to be asked."""
        body = {"lora_name": adapter.id, "lora_path": self._path_there(adapter.path)}
        try:
            await self._server.post("/v1/load_lora_adapter", body, self._settings.upstream.load_seconds)
        except Refused as refused:
            if refused.refusal.status in (400, 409) and await self._serves(adapter.id):
                return  # another gateway's doing, or this one's before it was restarted
            raise adapter_error_of(refused.refusal) from None

    async def unload(self, adapter_id: str) -> None:
        """What stands in the way is the upstream's: it may have forgotten it, or others may use it."""
        body = {"lora_name": adapter_id}
        try:
            await self._server.post("/v1/unload_lora_adapter", body, self._settings.upstream.load_seconds)
        except (Refused, EngineError) as error:
            _log.info("adapter %s was not unloaded: %s", adapter_id, error)

    async def embedding(self, request: EmbedRequest, info: EngineInfo, on_part: Callable[[], None]) -> Embedding:
        """Raises what `Engine.embed` does, and UnknownModel."""
        if request.composition:
            raise InvalidRequest("this engine computes with one adapter a request; it adds up none", "adapters")
        if not info.embedding_width:
            raise InvalidRequest("the upstream gives no embeddings", "model")
        body: dict[str, Any] = {"model": self.base if request.adapter is None else request.adapter.id}
        body |= {"input": request.prompt_token_ids, "encoding_format": "float"}
        if self._is_ours:
            body |= {"pooling": request.pooling, "normalize": request.normalize}
        else:
            self._require_own_pooling(request)
        try:
            found = msgspec.convert(await self._server.post(_EMBEDDINGS, body, seconds=None), _Vectors)
            values = tuple(found.data[0].embedding)
        except Refused as refused:
            raise error_of(refused.refusal) from None
        except (msgspec.ValidationError, IndexError) as error:
            raise GenerationFailed("the upstream's embedding is not in OpenAI's shape") from error
        on_part()
        num_cached = 0 if found.usage is None else found.usage.num_cached_tokens
        return Embedding(request_id=request.request_id, values=values, num_cached_tokens=num_cached)

    def _require_own_pooling(self, request: EmbedRequest) -> None:
        """How hidden states are pooled is set where vLLM is started; the settings say how."""
        model = self._settings.model
        if request.pooling != model.embedding_pooling:
            raise InvalidRequest(f"the upstream pools by {model.embedding_pooling!r} alone", "pooling")
        if request.normalize != model.normalize_embeddings:
            raise InvalidRequest(f"the upstream knows normalize = {model.normalize_embeddings} alone", "normalize")

    async def _asked(self, path: str) -> Any:
        try:
            return await self._server.get(path)
        except Refused as refused:
            if refused.refusal.status in (401, 403):
                raise ModelNotServable(
                    f"the upstream does not accept the key in {self._settings.upstream.api_key_env}"
                ) from None
            if refused.refusal.status == 404:
                raise EngineUnavailable(f"the upstream has no {path}") from None
            raise error_of(refused.refusal) from None

    async def _serves(self, name: str) -> bool:
        return any(one.id == name for one in served_models(await self._asked("/v1/models")))

    async def _embedding_width(self) -> int:
        """By one of a single token: whether there are embeddings shows nowhere else."""
        body = {"model": self.base, "input": [0], "encoding_format": "float"}
        try:
            return len(msgspec.convert(await self._server.post(_EMBEDDINGS, body), _Vectors).data[0].embedding)
        except (Refused, GenerationFailed, msgspec.ValidationError, IndexError):
            return 0

    def _path_there(self, path: str) -> str:
        here = Path(path).absolute()
        prefix = self._settings.upstream.path_prefix
        if prefix is not None and here.is_relative_to(known := Path(prefix[0]).expanduser().absolute()):
            return str(Path(prefix[1]) / here.relative_to(known))
        return str(here)
