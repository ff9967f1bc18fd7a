"""Everything of LoRAX's API."""

from litestar.handlers import HTTPRouteHandler

from loraplex.config.settings import Settings
from loraplex.engines.protocol import Engine
from loraplex.gateway.embedder import Embedder
from loraplex.gateway.lorax.embed import embed_routes
from loraplex.gateway.lorax.generate import generate_routes
from loraplex.gateway.lorax.info import info_routes
from loraplex.gateway.openai.answers import Answers
from loraplex.gateway.request_adapters import RequestAdapters


def lorax_routes(
    settings: Settings,
    engine: Engine,
    adapters: RequestAdapters,
    answers: Answers,
    embedder: Embedder,
) -> list[HTTPRouteHandler]:
    """The handlers of this folder."""
    return [
        *generate_routes(engine, adapters, answers),
        *embed_routes(engine, adapters, embedder),
        *info_routes(engine, settings.engine),
    ]
