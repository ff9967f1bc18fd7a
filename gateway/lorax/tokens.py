"""LoRAX's /tokenize: a text's tokens with their places in it."""

from typing import Any

import msgspec
from litestar import Request, Response
from msgspec import Struct

from loraplex.engines.protocol import Engine
from loraplex.gateway.decoding import Body
from loraplex.gateway.health import require_ready
from loraplex.gateway.openai.dialogue import LONG_TEXT
from loraplex.gateway.prompts import apart, told_room, too_long


class TokenizeInputs(Struct, forbid_unknown_fields=True):
    inputs: str
    add_special_tokens: bool | None = None


class PlacedToken(Struct):
    """`start` and `stop` count characters; `text` is what stands there, nothing for a token that was added."""

    id: int
    text: str
    start: int
    stop: int


_body = Body(TokenizeInputs)


async def lorax_tokens(request: Request[Any, Any, Any], raw: bytes, engine: Engine) -> Response[bytes]:
    """Raises MalformedRequest, PromptTooLong, UnknownParameter or EngineUnavailable."""
    body = _body.decode(raw)
    require_ready(engine)
    text, special = body.inputs, body.add_special_tokens is not False

    def spans() -> bytes:
        found = engine.tokenizer.spans(text, add_special_tokens=special, room=told_room(engine))
        return msgspec.json.encode(
            [PlacedToken(span.token_id, text[span.start : span.stop], span.start, span.stop) for span in found]
        )

    with too_long("inputs", engine.info().max_model_len):
        encoded = await apart(request, spans, is_long=len(text) > LONG_TEXT, is_counted=False)
    return Response(encoded, media_type="application/json")
