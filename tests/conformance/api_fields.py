"""Every field of every API's requests, and what becomes of it here: plain tables, made from the wire structs.

What an API has is read off its own client where there is one (the OpenAI SDK's types), else listed here; what is ours
beyond it is told as an extension.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

import msgspec
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params

from loraplex.gateway.lorax.embed import EmbedParameters, LoraxEmbedRequest
from loraplex.gateway.lorax.tokens import TokenizeInputs
from loraplex.gateway.lorax.wire import LoraxRequest, Parameters, ResponseFormat
from loraplex.gateway.openai.chat_wire import ChatRequest
from loraplex.gateway.openai.completions import CompletionRequest
from loraplex.gateway.openai.embeddings import EmbeddingRequest
from loraplex.gateway.openai.responses_request import ResponseRequest
from loraplex.gateway.request_adapters import MergedAdapters
from loraplex.gateway.vllm.adapters import LoadLoraAdapter, UnloadLoraAdapter
from loraplex.gateway.vllm.tokens import Detokenize, TokenizeChat, TokenizeText

State = Literal["honoured", "no effect", "not offered", "refused"]


@dataclass(frozen=True)
class Field:
    """`not offered`: known, and an error unless its value asks for nothing. `refused`: an error as an unknown field.

    `no effect` is said about a request and changes no answer, here as in the API itself.
    """

    name: str
    state: State
    is_extension: bool = False


@dataclass(frozen=True)
class Route:
    api: str
    path: str
    fields: tuple[Field, ...]


NO_EFFECT = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "store", "lora_int_id", "prompt_cache_retention"}
)
LORAX_NOT_OFFERED = frozenset({"parameters.watermark", "parameters.apply_chat_template"})
EXTENSIONS_OF_CLIENTS = frozenset({"extra_headers", "extra_query", "extra_body", "timeout"})  # the SDK's own arguments

# what LoRAX's server reads, and its client sends
LORAX_PARAMETERS = [
    "adapter_id",
    "adapter_source",
    "merged_adapters",
    "api_token",
    "best_of",
    "temperature",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "top_k",
    "top_p",
    "typical_p",
    "do_sample",
    "max_new_tokens",
    "ignore_eos_token",
    "return_full_text",
    "stop",
    "seed",
    "truncate",
    "watermark",
    "details",
    "decoder_input_details",
    "return_k_alternatives",
    "apply_chat_template",
    "response_format",
]
LORAX_GENERATE = (
    "inputs", "stream", "parameters", *(f"parameters.{name}" for name in LORAX_PARAMETERS),
    *(f"parameters.merged_adapters.{name}" for name in
      ("ids", "weights", "merge_strategy", "density", "majority_sign_method")),
    "parameters.response_format.type", "parameters.response_format.schema",
)  # fmt: skip
LORAX_EMBED = ("inputs", "parameters", "stream", *(f"parameters.{name}" for name in LORAX_PARAMETERS[:4]))
VLLM_TOKENIZE = ("model", "prompt", "add_special_tokens", "return_token_strs")
VLLM_TOKENIZE_CHAT = (
    "model", "messages", "add_generation_prompt", "return_token_strs", "continue_final_message", "add_special_tokens",
    "chat_template", "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs", "tools",
)  # fmt: skip


def routes() -> list[Route]:
    """All of them, in the order of the page."""
    chat = _typed(chat_params.CompletionCreateParamsBase, "stream")
    completion = _typed(completion_create_params.CompletionCreateParamsBase, "stream")
    response = _typed(response_create_params.ResponseCreateParamsBase, "stream")
    inner = {
        "parameters": Parameters,
        "parameters.merged_adapters": MergedAdapters,
        "parameters.response_format": ResponseFormat,
    }
    load = ("lora_name", "lora_path", "load_inplace", "is_3d_lora_weight")
    return [
        _route("OpenAI", "/v1/chat/completions", chat, ChatRequest),
        _route("OpenAI", "/v1/completions", completion, CompletionRequest),
        _route("OpenAI", "/v1/responses", response, ResponseRequest, told_again=("metadata", "store")),
        _route("OpenAI", "/v1/embeddings", _typed(embedding_create_params.EmbeddingCreateParams), EmbeddingRequest),
        *(
            _route("LoRAX", path, LORAX_GENERATE, LoraxRequest, inner)
            for path in ("/", "/invocations", "/generate", "/generate_stream")
        ),
        _route("LoRAX", "/embed", LORAX_EMBED, LoraxEmbedRequest, {"parameters": EmbedParameters}),
        _route("LoRAX", "/tokenize", ("inputs", "add_special_tokens"), TokenizeInputs),
        _route("vLLM", "/tokenize", VLLM_TOKENIZE, TokenizeText),
        _route("vLLM", "/tokenize (messages)", VLLM_TOKENIZE_CHAT, TokenizeChat),
        _route("vLLM", "/detokenize", ("model", "tokens"), Detokenize),
        _route("vLLM", "/v1/load_lora_adapter", load, LoadLoraAdapter),
        _route("vLLM", "/v1/unload_lora_adapter", ("lora_name", "lora_int_id"), UnloadLoraAdapter),
    ]


def _typed(params: Any, *more: str) -> tuple[str, ...]:
    """The fields of the SDK's type of a request."""
    return tuple(name for name in (*get_type_hints(params), *more) if name not in EXTENSIONS_OF_CLIENTS)


def _route(
    api: str,
    path: str,
    theirs: Iterable[str],
    struct: Any,
    inner: dict[str, Any] | None = None,
    told_again: Sequence[str] = (),
) -> Route:
    """`inner` are the structs of fields that have some of their own; `told_again` does have an effect on this route."""
    ours = _states(struct, "", told_again)
    for place, part in (inner or {}).items():
        ours |= _states(part, f"{place}.", told_again)
    known = tuple(dict.fromkeys(theirs))
    fields = [Field(name, ours.get(name, "refused")) for name in known]
    extensions = [Field(name, state, is_extension=True) for name, state in ours.items() if name not in known]
    return Route(api, path, tuple(fields + extensions))


def _states(struct: Any, prefix: str, told_again: Sequence[str]) -> dict[str, State]:
    not_offered = {f"{prefix}{name}" for name in getattr(struct, "not_offered", ())} | LORAX_NOT_OFFERED
    without_effect = {f"{prefix}{name}" for name in NO_EFFECT.difference(told_again)}
    names = [f"{prefix}{field.encode_name}" for field in msgspec.structs.fields(struct)]
    return {
        name: "not offered" if name in not_offered else "no effect" if name in without_effect else "honoured"
        for name in names
    }
