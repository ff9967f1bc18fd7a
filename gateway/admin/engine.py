"""/admin/v1/engine: what the engine serves, its counters, and to load the base model anew."""

from litestar import Response, get, post
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

    @post("/admin/v1/engine/reload", status_code=200, guards=[require_admin])
    async def reload_engine() -> Response[bytes]:
        """The model's files may have changed: new requests go to a fresh process, streams finish in the old one."""
        return json_reply(await engine.reload())

    return [get_engine, get_stats, reload_engine]
