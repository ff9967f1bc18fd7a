"""POST /, /invocations, /generate and /generate_stream."""

from typing import Any

from litestar import Request
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp
from msgspec import Struct

from loraplex.auth.caller import Caller
from loraplex.engines.protocol import Engine, Grammar
from loraplex.gateway.decoding import Body
from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.guards import caller_of, inference_post
from loraplex.gateway.lorax.headers import Stopwatch, stream_headers, whole_headers
from loraplex.gateway.lorax.problems import FRAMING, respond_flat
from loraplex.gateway.lorax.replies import LoraxWire
from loraplex.gateway.lorax.requests import lorax_requests
from loraplex.gateway.lorax.wire import LoraxRequest
from loraplex.gateway.middleware import tell
from loraplex.gateway.openai.answers import Answers
from loraplex.gateway.prompts import tokenizer_for
from loraplex.gateway.request_adapters import MergedAdapters, RequestAdapters

_body = Body(LoraxRequest)


class _Asked(Struct, frozen=True, kw_only=True):
    """Implements `Asked`."""

    model: str
    stream: bool
    max_tokens: int | None
    num_choices: int
    grammar: Grammar | None
    includes_usage: bool = False

    def complaint(self, reason: str) -> tuple[str, str] | None:
        return None if self.grammar is None else ("response_format", reason)


def generate_routes(engine: Engine, adapters: RequestAdapters, answers: Answers) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    async def answer(request: Request[Any, Any, Any], body: LoraxRequest, *, streams: bool, as_list: bool) -> ASGIApp:
        watch = Stopwatch()
        parameters = body.check(streams=streams)
        caller = caller_of(request)
        route = await adapters.route(
            caller,
            adapter_id=parameters.adapter_id,
            adapter_source=parameters.adapter_source,
            api_token=parameters.api_token,
            merged=parameters.merged_adapters,
        )
        tells_tokens = streams or parameters.wants_details
        choices = await lorax_requests(
            request, body.inputs, parameters, tells_tokens=tells_tokens, route=route, engine=engine
        )
        watch.validated()
        tokenizer = await tokenizer_for(route, engine)
        wire = LoraxWire(body.inputs, parameters, choices, tokenizer, as_list=as_list)
        asked = _Asked(
            model=label(parameters.adapter_id, parameters.merged_adapters, adapters, caller),
            stream=streams,
            max_tokens=parameters.max_new_tokens,
            num_choices=len(choices),
            grammar=choices[0].sampling.grammar,
        )
        response = await answers.respond(request, asked, choices, wire, FRAMING, watch.see)
        tell(request, stream_headers(body.inputs, parameters, engine.info()))
        if not streams:
            tell(request, whole_headers(watch, wire.best, len(choices[0].prompt_token_ids)))
        return response

    @inference_post(["/", "/invocations"], exception_handlers={Exception: respond_flat})
    async def generate_either(request: Request[Any, Any, Any]) -> ASGIApp:
        body = await _body.of(request)
        return await answer(request, body, streams=bool(body.stream), as_list=True)

    @inference_post("/generate", exception_handlers={Exception: respond_flat})
    async def generate(request: Request[Any, Any, Any]) -> ASGIApp:
        body = await _body.of(request)
        if body.stream:
            raise MalformedRequest("`stream` is for /generate_stream and /", "stream")
        return await answer(request, body, streams=False, as_list=False)

    @inference_post("/generate_stream", exception_handlers={Exception: respond_flat})
    async def generate_stream(request: Request[Any, Any, Any]) -> ASGIApp:
        body = await _body.of(request)
        if body.stream is False:
            raise MalformedRequest("`stream` cannot be false here; use /generate", "stream")
        return await answer(request, body, streams=True, as_list=False)

    return [generate_either, generate, generate_stream]


def label(adapter_id: str | None, merged: MergedAdapters | None, adapters: RequestAdapters, caller: Caller) -> str:
    """The model's name in metrics and books: one of the catalogue's, or what kind of adapter the request named."""
    return "merged-adapters" if merged is not None else adapters.label(adapter_id or adapters.base, caller)
