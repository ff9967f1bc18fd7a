"""POST /v1/chat/completions, streamed and not."""

import time
from typing import Any

import msgspec
from litestar import Request, Response, post
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from loraplex.config.settings import Server
from loraplex.engines.protocol import Engine, GenerateRequest, TokenEvent
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.decoding import Body
from loraplex.gateway.guards import caller_of, require_inference
from loraplex.gateway.openai.chat_wire import AnswerMessage, ChatCompletion, ChatRequest, Choice, ChunkFrames, Usage
from loraplex.gateway.prompts import to_generate_request
from loraplex.gateway.sse import DONE, Relay, StreamResponse, unless_client_leaves

_body = Body(ChatRequest)


def chat_routes(engine: Engine, catalogue: Catalogue, server: Server) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    @post("/v1/chat/completions", status_code=200, guards=[require_inference])
    async def create_chat_completion(request: Request[Any, Any, Any]) -> ASGIApp:
        body = await _body.of(request)
        body.check()
        caller = caller_of(request)
        route = await catalogue.route(body.model, caller)
        generate = to_generate_request(body, route, caller, engine)
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            relay = _relay(engine, generate, body.model, include_usage)
            try:
                await relay.begin(server.keep_alive_seconds)
            except BaseException:
                await relay.close()
                raise
            return StreamResponse(  # type: ignore[return-value]  # an ASGI app of Starlette's types
                relay, keep_alive_seconds=server.keep_alive_seconds, send_timeout_seconds=server.send_timeout_seconds
            )
        completion = await unless_client_leaves(request.receive, _complete(engine, generate, body.model))
        return Response(msgspec.json.encode(completion), media_type="application/json")  # type: ignore[return-value]

    return [create_chat_completion]


async def _complete(engine: Engine, generate: GenerateRequest, model: str) -> ChatCompletion:
    """The whole answer at once."""
    created = int(time.time())
    texts: list[str] = []
    num_tokens = 0
    finish_reason = None
    async for event in engine.generate(generate):
        texts.append(event.text)
        num_tokens += len(event.token_ids)
        finish_reason = event.finish_reason
    assert finish_reason is not None, "an engine ends every answer with a reason"
    choice = Choice(message=AnswerMessage(content="".join(texts)), finish_reason=finish_reason)
    return ChatCompletion(
        id=generate.request_id, created=created, model=model, choices=[choice], usage=_usage(generate, num_tokens)
    )


def _relay(engine: Engine, generate: GenerateRequest, model: str, include_usage: bool) -> Relay:
    """The answer as frames: role, texts, finish, usage if asked for, [DONE]."""
    frames = ChunkFrames(generate.request_id, int(time.time()), model, include_usage=include_usage)
    num_tokens = 0

    def encode(event: TokenEvent) -> bytes:
        nonlocal num_tokens
        encoded = b"" if num_tokens else frames.role()
        num_tokens += len(event.token_ids)
        if event.text:
            encoded += frames.text(event.text)
        if event.finish_reason is not None:
            encoded += frames.finish(event.finish_reason)
        return encoded

    def end() -> bytes:
        return (frames.usage(_usage(generate, num_tokens)) if include_usage else b"") + DONE

    return Relay(engine.generate(generate), encode, end)


def _usage(generate: GenerateRequest, num_tokens: int) -> Usage:
    prompt = len(generate.prompt_token_ids)
    return Usage(prompt_tokens=prompt, completion_tokens=num_tokens, total_tokens=prompt + num_tokens)
