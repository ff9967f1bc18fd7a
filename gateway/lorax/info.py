"""GET /, /info and /startup, and the routes of LoRAX that this server does not offer."""

import asyncio
from importlib.metadata import version
from typing import Any, NoReturn

from litestar import Request, Response, get, post
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from loraplex.config.settings import EngineSettings
from loraplex.engines.errors import EngineError
from loraplex.engines.protocol import Engine, EngineInfo, GenerateRequest, SamplingParams
from loraplex.gateway.errors import UnsupportedParameter
from loraplex.gateway.guards import require_inference
from loraplex.gateway.health import health_reply, require_ready
from loraplex.gateway.lorax.problems import respond_flat
from loraplex.gateway.lorax.wire import MAX_BEST_OF, MAX_STOP_SEQUENCES
from loraplex.gateway.replies import json_reply


class Info(Struct, kw_only=True):
    """LoRAX's fields. What only LoRAX's scheduler knows has the value that comes nearest to how ours works."""

    model_id: str
    model_dtype: str
    model_device_type: str
    max_concurrent_requests: int
    max_input_length: int
    max_total_tokens: int
    max_batch_total_tokens: int
    version: str
    model_sha: str | None = None
    model_pipeline_tag: str = "text-generation"
    max_best_of: int = MAX_BEST_OF
    max_stop_sequences: int = MAX_STOP_SEQUENCES
    waiting_served_ratio: float = 0.0  # a request that waits is looked at in every step
    max_waiting_tokens: int = 0
    validation_workers: int = 1
    eager_prefill: bool = True
    sha: str | None = None
    docker_label: str | None = None
    request_logger_url: str | None = None


def info_routes(engine: Engine, settings: EngineSettings) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""
    startup = _Startup(engine)

    @get("/")
    async def root() -> Response[bytes]:
        return health_reply(engine)

    @get("/startup", exception_handlers={Exception: respond_flat})
    async def started() -> Response[bytes]:
        if engine.health().state == "ready":
            await startup.prove()
        return health_reply(engine)

    @get("/info", guards=[require_inference], exception_handlers={Exception: respond_flat})
    async def info() -> Response[bytes]:
        require_ready(engine)
        return json_reply(_info(engine.info(), settings))

    @post(["/classify", "/classify_batch"], guards=[require_inference], exception_handlers={Exception: respond_flat})
    async def classify(request: Request[Any, Any, Any]) -> NoReturn:
        raise UnsupportedParameter(
            f"{request.scope['path']} is not offered: this server's models generate text, they do not classify it", None
        )

    return [root, started, info, classify]


class _Startup:
    """Generates one token, once: whoever asks meanwhile or later learns how that went."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_proven = False
        self._proving = asyncio.Lock()

    async def prove(self) -> None:
        """Raises EngineError while the engine cannot generate."""
        async with self._proving:
            if not self._is_proven:
                await self._generate()
                self._is_proven = True

    async def _generate(self) -> None:
        prompt = self._engine.tokenizer.encode("a")
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(request_id="startup", prompt_token_ids=tuple(prompt), sampling=sampling)
        async for event in self._engine.generate(request):
            if event.finish_reason is not None:
                return
        raise EngineError("the engine ended an answer without a reason")


def _info(found: EngineInfo, settings: EngineSettings) -> Info:
    return Info(
        model_id=found.base_model,
        model_dtype=found.dtype,
        model_device_type=found.device.partition(":")[0],
        max_concurrent_requests=settings.max_running + settings.max_waiting,
        max_input_length=found.max_model_len - 1,
        max_total_tokens=found.max_model_len,
        max_batch_total_tokens=found.num_kv_blocks * found.kv_block_size,
        version=version("loraplex"),
    )
