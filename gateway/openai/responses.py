"""POST /v1/responses, and what was stored of earlier ones."""

import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from litestar import Request, delete, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp
from msgspec import Struct

from loraplex.config.settings import Model
from loraplex.engines.protocol import Engine, GenerateRequest
from loraplex.gateway.decoding import Body
from loraplex.gateway.errors import MalformedRequest, UnsupportedParameter
from loraplex.gateway.guards import caller_of, inference_post, require_inference
from loraplex.gateway.openai.answers import Answers
from loraplex.gateway.openai.dialogue import Dialogue
from loraplex.gateway.openai.response_store import ResponseStore, StoredResponse
from loraplex.gateway.openai.responses_items import InputItem, listed
from loraplex.gateway.openai.responses_prompt import Asked, Prompting
from loraplex.gateway.openai.responses_request import ResponseRequest, named_as_asked
from loraplex.gateway.openai.responses_stream import ResponseWire, begun_response
from loraplex.gateway.openai.routing import route_of
from loraplex.gateway.openai.tiers import at_tier, granted_tier
from loraplex.gateway.prompts import apart, checked
from loraplex.gateway.replies import json_reply
from loraplex.gateway.request_adapters import RequestAdapters
from loraplex.gateway.sse import Framing


class DeletedResponse(Struct):
    id: str
    object: str = "response"
    deleted: bool = True


class ItemList(Struct):
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool
    object: str = "list"


class InputTokens(Struct):
    input_tokens: int
    object: str = "response.input_tokens"


_body = Body(ResponseRequest)
_LIMIT = 20  # items a page, unless asked otherwise


def response_routes(
    engine: Engine, adapters: RequestAdapters, answers: Answers, store: ResponseStore, model: Model
) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    async def prepared(
        request: Request[Any, Any, Any], asked: Asked, response_id: str
    ) -> tuple[Dialogue, list[GenerateRequest]]:
        caller = caller_of(request)
        route = await route_of(asked.body, caller, adapters)
        earlier = await store.conversation(caller, asked.body.previous_response_id)
        make = Prompting(request, asked, response_id, route, engine, model)
        return await (make.cut(earlier) if asked.body.truncation == "auto" else make.whole(earlier))

    @inference_post("/v1/responses")
    async def create_response(request: Request[Any, Any, Any]) -> ASGIApp:
        body, is_large = asked = Asked(*await checked(_body, request))
        caller = caller_of(request)
        response_id = f"resp_{secrets.token_hex(24)}"
        with named_as_asked():
            dialogue, choices = await prepared(request, asked, response_id)
            tier = granted_tier(body.service_tier, caller)
            wire = ResponseWire(begun_response(response_id, body, tier), dialogue.speech(), dialogue.tokenizer)

            async def keep() -> None:
                if body.store is not False:
                    listing = partial(_listed, body.items)
                    items = await apart(request, listing, is_long=is_large, is_counted=False)  # it is already
                    stored = StoredResponse(msgspec.json.encode(wire.response), items)
                    await store.save(caller, response_id, stored, body.previous_response_id)

            framing = Framing(b"", wire.error)
            choices, stopping = at_tier(tier, choices), dialogue.stopping
            label = adapters.label(body.model, caller)
            return await answers.respond(
                request, dialogue, choices, wire, framing, before_end=keep, stopping=stopping, label=label
            )

    @inference_post("/v1/responses/input_tokens")
    async def count_input_tokens(request: Request[Any, Any, Any]) -> ASGIApp:
        asked = Asked(*await checked(_body, request))
        with named_as_asked():
            _, choices = await prepared(request, asked, "count")
        return json_reply(InputTokens(len(choices[0].prompt_token_ids)))  # type: ignore[return-value]

    return [create_response, count_input_tokens, *_stored_routes(store)]


def _stored_routes(store: ResponseStore) -> list[HTTPRouteHandler]:
    """What can be asked of a response that was made, and what is not offered."""

    @get("/v1/responses/{response_id:str}", guards=[require_inference])
    async def retrieve_response(request: Request[Any, Any, Any]) -> ASGIApp:
        for name in ("stream", "starting_after", "include_obfuscation"):
            if request.query_params.get(name, "false") != "false":
                raise UnsupportedParameter("A response that is complete is not streamed again.", name)
        stored = await store.get(caller_of(request), request.path_params["response_id"])
        return json_reply(msgspec.Raw(stored.response))  # type: ignore[arg-type,return-value]

    @delete("/v1/responses/{response_id:str}", status_code=200, guards=[require_inference])
    async def delete_response(request: Request[Any, Any, Any]) -> ASGIApp:
        response_id = request.path_params["response_id"]
        await store.delete(caller_of(request), response_id)
        return json_reply(DeletedResponse(response_id))  # type: ignore[return-value]

    @post("/v1/responses/{response_id:str}/cancel", guards=[require_inference])
    async def cancel_response(request: Request[Any, Any, Any]) -> ASGIApp:
        await store.get(caller_of(request), request.path_params["response_id"])
        raise MalformedRequest("Only a response made in the background can be cancelled; close the connection instead.")

    @post("/v1/responses/compact", guards=[require_inference])
    async def compact_response(request: Request[Any, Any, Any]) -> ASGIApp:
        raise UnsupportedParameter("Compaction is not offered; truncation is.")

    @get("/v1/responses/{response_id:str}/input_items", guards=[require_inference])
    async def list_input_items(request: Request[Any, Any, Any]) -> ASGIApp:
        stored = await store.get(caller_of(request), request.path_params["response_id"])
        return json_reply(_page(stored.items, request.query_params))  # type: ignore[return-value]

    return [retrieve_response, delete_response, cancel_response, compact_response, list_input_items]


def _listed(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    return [listed(item) for item in items]


def _page(items: list[dict[str, Any]], query: Any) -> ItemList:
    """Raises MalformedRequest, naming the field."""
    order, limit, after = query.get("order", "desc"), query.get("limit", str(_LIMIT)), query.get("after")
    if order not in ("asc", "desc"):
        raise MalformedRequest("It is asc or desc.", "order")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= 100):
        raise MalformedRequest("It is a number from 1 to 100.", "limit")
    ordered = items if order == "asc" else items[::-1]
    if after is not None:
        place = next((place for place, item in enumerate(ordered) if item["id"] == after), None)
        if place is None:
            raise MalformedRequest("There is no item with this id.", "after")
        ordered = ordered[place + 1 :]
    data = ordered[: int(limit)]
    first, last = (data[0]["id"], data[-1]["id"]) if data else ("", "")
    return ItemList(data, first, last, len(ordered) > len(data))
