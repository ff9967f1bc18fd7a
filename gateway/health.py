"""GET /health and /ping: for load balancers, without a key; and what routes ask before they use the engine."""

from litestar import Response, get, post
from litestar.handlers import HTTPRouteHandler
from msgspec import UNSET, Struct, UnsetType

from loraplex.engines.errors import EngineUnavailable
from loraplex.engines.protocol import Engine, HealthState
from loraplex.gateway.replies import json_reply


class HealthView(Struct):
    """The engine's state, and the reason where it is not ready; `error` and `error_type` then, as LoRAX tells it."""

    state: HealthState
    detail: str
    error: str | UnsetType = UNSET
    error_type: str | UnsetType = UNSET


def health_routes(engine: Engine) -> list[HTTPRouteHandler]:
    """200 where requests can be served, else 503 with the engine's state."""

    @get(["/health", "/ping"])
    async def health() -> Response[bytes]:
        return health_reply(engine)

    @post("/ping", status_code=200)
    async def ping() -> Response[bytes]:
        return health_reply(engine)

    return [health, ping]


def health_reply(engine: Engine) -> Response[bytes]:
    """What every route that asks after the server's health says."""
    found = engine.health()
    if found.state == "ready":
        return json_reply(HealthView(found.state, found.detail))
    return json_reply(HealthView(found.state, found.detail, "unhealthy", "healthcheck"), 503)


def require_ready(engine: Engine) -> None:
    """An engine has no tokenizer and nothing to tell of itself before it is ready. Raises EngineUnavailable."""
    state = engine.health().state
    if state != "ready":
        raise EngineUnavailable(f"The engine is {state}; try again shortly.")
