"""GET /health and /ping: for load balancers, without a key; and what routes ask before they use the engine."""

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from loraplex.engines.errors import EngineUnavailable
from loraplex.engines.protocol import Engine
from loraplex.gateway.replies import json_reply


def health_routes(engine: Engine) -> list[HTTPRouteHandler]:
    """200 where requests can be served, else 503 with the engine's state."""

    @get(["/health", "/ping"])
    async def health() -> Response[bytes]:
        found = engine.health()
        status = 200 if found.state == "ready" else 503
        return json_reply(found, status)

    return [health]


def require_ready(engine: Engine) -> None:
    """An engine has no tokenizer and nothing to tell of itself before it is ready. Raises EngineUnavailable."""
    state = engine.health().state
    if state != "ready":
        raise EngineUnavailable(f"The engine is {state}; try again shortly.")
