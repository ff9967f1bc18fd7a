"""GET /health and /ping: for load balancers, without a key."""

import msgspec
from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from loraplex.engines.protocol import Engine


def health_routes(engine: Engine) -> list[HTTPRouteHandler]:
    """200 where requests can be served, else 503 with the engine's state."""

    @get(["/health", "/ping"])
    async def health() -> Response[bytes]:
        found = engine.health()
        status = 200 if found.state == "ready" else 503
        return Response(msgspec.json.encode(found), status_code=status, media_type="application/json")

    return [health]
