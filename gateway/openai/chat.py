"""POST /v1/chat/completions."""

import secrets
from functools import partial
from typing import Any

from litestar import Request
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from loraplex.config.settings import Model
from loraplex.engines.protocol import Engine
from loraplex.gateway.decoding import Body
from loraplex.gateway.guards import caller_of, inference_post
from loraplex.gateway.middleware import name_request
from loraplex.gateway.openai.answers import Answers
from loraplex.gateway.openai.chat_stream import ChatWire, SpokenWire
from loraplex.gateway.openai.chat_wire import ChatRequest
from loraplex.gateway.openai.dialogue import Dialogue
from loraplex.gateway.openai.routing import composed_route_of
from loraplex.gateway.openai.tiers import at_tier, granted_tier
from loraplex.gateway.prompts import apart, chat_requests, checked, tokenizer_for
from loraplex.gateway.request_adapters import RequestAdapters

_body = Body(ChatRequest)


def chat_routes(engine: Engine, adapters: RequestAdapters, answers: Answers, model: Model) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    @inference_post("/v1/chat/completions")
    async def create_chat_completion(request: Request[Any, Any, Any]) -> ASGIApp:
        body, is_large = await checked(_body, request)
        caller = caller_of(request)
        route = await composed_route_of(body, caller, adapters)
        tokenizer = await tokenizer_for(route, engine)
        dialogue = await apart(request, partial(Dialogue, body, tokenizer, model, is_large=is_large), is_long=is_large)
        completion_id = told_id = f"chatcmpl-{secrets.token_hex(12)}"
        if body.request_id is not None:
            name_request(request, body.request_id)
            told_id = f"chatcmpl-{body.request_id}"
        tier = granted_tier(body.service_tier, caller)
        choices = at_tier(tier, await chat_requests(request, dialogue, completion_id, route, engine))
        prompt = choices[0].prompt_token_ids
        wire = ChatWire(told_id, body, dialogue.tokenizer, tier, prompt)
        if not dialogue.is_plain:
            speeches = [dialogue.speech() for _ in choices]
            wire = SpokenWire(told_id, body, dialogue.tokenizer, tier, prompt, speeches)
        label = adapters.label(body.model, caller)
        return await answers.respond(request, dialogue, choices, wire, stopping=dialogue.stopping, label=label)

    return [create_chat_completion]
