"""POST /tokenize and /detokenize, as vLLM has them; a body with `inputs` is LoRAX's /tokenize.

A conversation's tokens are those that /v1/chat/completions would compute, with the adapter's own tokenizer where it has
one.
"""

from functools import partial
from typing import Annotated, Any, ClassVar

import msgspec
from litestar import Request, Response
from litestar.handlers import HTTPRouteHandler
from msgspec import UNSET, Raw, Struct, UnsetType

from loraplex.config.settings import Model
from loraplex.engines.protocol import Engine
from loraplex.engines.tokenizer_protocol import Tokenizer
from loraplex.gateway.decoding import Body, read
from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.guards import caller_of, inference_post
from loraplex.gateway.health import require_ready
from loraplex.gateway.lorax.problems import respond_flat
from loraplex.gateway.lorax.tokens import lorax_tokens
from loraplex.gateway.openai.chat_messages import Message
from loraplex.gateway.openai.chat_wire import ChatRequest
from loraplex.gateway.openai.dialogue import LONG_TEXT, Dialogue
from loraplex.gateway.openai.routing import route_to
from loraplex.gateway.openai.tool_wire import FunctionTool
from loraplex.gateway.openai.wire import refuse_what_matters
from loraplex.gateway.prompts import apart, tokenizer_for, told_room, too_long
from loraplex.gateway.replies import json_reply
from loraplex.gateway.request_adapters import RequestAdapters


class _Kind(Struct):
    """Whose body it is; what it says is read later."""

    inputs: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    messages: Raw | UnsetType = UNSET


class TokenizeText(Struct, forbid_unknown_fields=True, kw_only=True):
    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeChat(Struct, forbid_unknown_fields=True, kw_only=True):
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    model: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    tools: list[FunctionTool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # known, not offered
    add_special_tokens: Raw | UnsetType = UNSET
    chat_template: Raw | UnsetType = UNSET
    mm_processor_kwargs: Raw | UnsetType = UNSET
    media_io_kwargs: Raw | UnsetType = UNSET

    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {
        "add_special_tokens": (False,),  # the template writes them
        "chat_template": (),
        "mm_processor_kwargs": ({},),
        "media_io_kwargs": ({},),
    }

    def as_chat(self, base: str) -> ChatRequest:
        """The chat whose prompt it is. Raises MalformedRequest or UnsupportedParameter, naming the field."""
        refuse_what_matters(self, self.not_offered)
        chat = ChatRequest(
            model=self.model or base,
            messages=self.messages,
            tools=self.tools,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        chat.check()
        return chat


class Tokens(Struct):
    """`token_strs` are the vocabulary's own names."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenize(Struct, forbid_unknown_fields=True):
    tokens: list[int]
    model: str | None = None


class Text(Struct):
    prompt: str


_kind, _text, _chat, _detokenize = Body(_Kind), Body(TokenizeText), Body(TokenizeChat), Body(Detokenize)


def token_routes(engine: Engine, adapters: RequestAdapters, model: Model) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    async def tokenizer_named(request: Request[Any, Any, Any], name: str | None) -> Tokenizer:
        return await tokenizer_for(await route_to(name, caller_of(request), adapters), engine)

    def told(tokens: list[int], tokenizer: Tokenizer, *, with_names: bool) -> Response[bytes]:
        names = [tokenizer.token_name(token) for token in tokens] if with_names else None
        return json_reply(Tokens(len(tokens), engine.info().max_model_len, tokens, names))

    async def tokenize_chat(request: Request[Any, Any, Any], raw: bytes) -> Response[bytes]:
        body = _chat.decode(raw)
        tokenizer = await tokenizer_named(request, body.model)
        dialogue = Dialogue(body.as_chat(adapters.base), tokenizer, model)
        with too_long("messages", engine.info().max_model_len):
            work = partial(dialogue.encode, told_room(engine))
            tokens = await apart(request, work, is_long=dialogue.is_long, is_counted=False)
        return told(tokens, tokenizer, with_names=bool(body.return_token_strs))

    async def tokenize_text(request: Request[Any, Any, Any], raw: bytes) -> Response[bytes]:
        body = _text.decode(raw)
        tokenizer = await tokenizer_named(request, body.model)
        work = partial(
            tokenizer.encode, body.prompt, add_special_tokens=body.add_special_tokens, room=told_room(engine)
        )
        with too_long("prompt", engine.info().max_model_len):
            tokens = await apart(request, work, is_long=len(body.prompt) > LONG_TEXT, is_counted=False)
        return told(tokens, tokenizer, with_names=bool(body.return_token_strs))

    @inference_post("/tokenize")
    async def tokenize(request: Request[Any, Any, Any]) -> Response[bytes]:
        raw = await read(request)
        kind = _kind.told(request, raw)
        if kind.inputs is not UNSET:
            try:
                return await lorax_tokens(request, raw, engine)
            except Exception as error:  # noqa: BLE001  the route's edge: LoRAX's clients expect its own shape
                return respond_flat(request, error)
        require_ready(engine)
        if (kind.prompt is UNSET) == (kind.messages is UNSET):
            raise MalformedRequest("Send either prompt or messages.", "prompt")
        return await (tokenize_chat if kind.prompt is UNSET else tokenize_text)(request, raw)

    @inference_post("/detokenize")
    async def detokenize(request: Request[Any, Any, Any]) -> Response[bytes]:
        body = await _detokenize.of(request)
        require_ready(engine)
        tokenizer = await tokenizer_named(request, body.model)
        vocab_size = engine.info().vocab_size
        if not all(0 <= token < vocab_size for token in body.tokens):
            raise MalformedRequest(f"Token ids run from 0 to {vocab_size - 1}.", "tokens")
        work = partial(tokenizer.decode, body.tokens, skip_special_tokens=False)
        text = await apart(request, work, is_long=len(body.tokens) > LONG_TEXT, is_counted=False)
        return json_reply(Text(text))

    return [tokenize, detokenize]
