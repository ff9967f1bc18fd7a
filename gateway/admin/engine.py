"""GET /admin/v1/engine and /admin/v1/engine/stats: what the engine serves, and its counters."""

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from loraplex.engines.protocol import Engine
from loraplex.gateway.guards import require_admin
from loraplex.gateway.health import require_ready
from loraplex.gateway.replies import json_reply


def engine_routes(engine: Engine) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    @get("/admin/v1/engine", guards=[require_admin])
    async def get_engine() -> Response[bytes]:
        require_ready(engine)
        return json_reply(engine.info())

    @get("/admin/v1/engine/stats", guards=[require_admin])
    async def get_stats() -> Response[bytes]:
        return json_reply(await engine.stats())

    return [get_engine, get_stats]
