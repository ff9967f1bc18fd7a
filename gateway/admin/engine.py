"""GET /admin/v1/engine and /admin/v1/engine/stats: what the engine serves, and its counters."""

import msgspec
from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from loraplex.engines.protocol import Engine
from loraplex.gateway.guards import require_admin


def engine_routes(engine: Engine) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    @get("/admin/v1/engine", guards=[require_admin])
    async def get_engine() -> Response[bytes]:
        return Response(msgspec.json.encode(engine.info()), media_type="application/json")

    @get("/admin/v1/engine/stats", guards=[require_admin])
    async def get_stats() -> Response[bytes]:
        return Response(msgspec.json.encode(await engine.stats()), media_type="application/json")

    return [get_engine, get_stats]
