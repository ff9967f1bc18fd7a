"""Every field of every API's requests, and what becomes of it here, and docs/api-compatibility.md made from that.

What an API has is read off its own client where there is one (the OpenAI SDK's types), else listed here; what is ours
beyond it is told as an extension. What becomes of it is read off the structs that decode it.

    PYTHONPATH=.src:tests python -m conformance.api_fields > docs/api-compatibility.md
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, get_type_hints

import msgspec
from openai.types import batch_create_params, completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params

from loraplex.gateway.lorax.embed import EmbedParameters, LoraxEmbedRequest
from loraplex.gateway.lorax.tokens import TokenizeInputs
from loraplex.gateway.lorax.wire import LoraxRequest, Parameters, ResponseFormat
from loraplex.gateway.openai.batches import NewBatch
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

    `no effect` is said about a request and changes no answer, here as in the API itself. `harmless` are the values of
    one that is not offered that ask for nothing, beside null; None where any value is an error.
    """

    name: str
    state: State
    is_extension: bool = False
    harmless: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Route:
    """`structs` are what its handler decodes, each with the place of its fields in the body."""

    api: str
    path: str
    fields: tuple[Field, ...]
    structs: tuple[tuple[str, Any], ...]


NO_EFFECT = frozenset({"metadata", "safety_identifier", "prompt_cache_key", "lora_int_id"})
LORAX_NOT_OFFERED = frozenset({"parameters.watermark", "parameters.apply_chat_template"})
EXTENSIONS_OF_CLIENTS = frozenset({"extra_headers", "extra_query", "extra_body", "timeout"})  # the SDK's own arguments

# (API, what of it is there, what is not and how that is told)
OFFERS = (
    (
        "OpenAI",
        "`/v1/chat/completions`, `/v1/completions`, `/v1/responses` (create, stream, get, delete, input items, input "
        "tokens), `/v1/embeddings`, `/v1/models` (list, get, delete), `/v1/files`, `/v1/batches`",
        "audio, images, moderation, fine-tuning, assistants, vector stores: 404; `/v1/responses/compact` and responses "
        "in the background: refused by name",
    ),
    (
        "LoRAX",
        "`/`, `/generate`, `/generate_stream`, `/invocations`, `/info`, `/health`, `/ping`, `/startup`, `/tokenize`, "
        "`/embed`, `/metrics`",
        "`/classify`, `/classify_batch`: 422 that says so",
    ),
    (
        "vLLM",
        "`/v1/load_lora_adapter`, `/v1/unload_lora_adapter`, `/tokenize`, `/detokenize`, `/health`, `/ping`, "
        "`/version`",
        "pooling, scoring, transcription: 404",
    ),
)

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
        _route("OpenAI", "/v1/responses", response, ResponseRequest, told_again=("metadata",)),
        _route("OpenAI", "/v1/embeddings", _typed(embedding_create_params.EmbeddingCreateParams), EmbeddingRequest),
        _route(
            "OpenAI", "/v1/batches", _typed(batch_create_params.BatchCreateParams), NewBatch, told_again=("metadata",)
        ),
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
    structs = (("", struct), *((f"{place}.", part) for place, part in (inner or {}).items()))
    ours = {name: field for prefix, part in structs for name, field in _fields(part, prefix, told_again)}
    known = tuple(dict.fromkeys(theirs))
    fields = [ours.get(name, Field(name, "refused")) for name in known]
    extensions = [replace(field, is_extension=True) for name, field in ours.items() if name not in known]
    return Route(api, path, tuple(fields + extensions), structs)


def _fields(struct: Any, prefix: str, told_again: Sequence[str]) -> Iterator[tuple[str, Field]]:
    not_offered = {f"{prefix}{name}": values for name, values in getattr(struct, "not_offered", {}).items()}
    without_effect = {f"{prefix}{name}" for name in NO_EFFECT.difference(told_again)}
    for field in msgspec.structs.fields(struct):
        name = f"{prefix}{field.encode_name}"
        if name in not_offered or name in LORAX_NOT_OFFERED:
            yield name, Field(name, "not offered", harmless=not_offered.get(name))
        else:
            yield name, Field(name, "no effect" if name in without_effect else "honoured")


def markdown() -> str:
    """The page."""
    lines = [
        "# What of each API is offered",
        "",
        "Field by field. A field that is not in a table is refused as unknown, with its name; nothing is accepted and",
        "ignored. Made by `PYTHONPATH=.src:tests python -m conformance.api_fields`; a test compares this page with the",
        "code, and sends the server each field that is not honoured.",
        "",
        "| API | offered | not offered |",
        "|---|---|---|",
        *(f"| {api} | {offered} | {not_offered} |" for api, offered, not_offered in OFFERS),
    ]
    for (api, fields), alike in groupby(routes(), lambda route: (route.api, route.fields)):
        paths = ", ".join(f"`{route.path}`" for route in alike)
        lines += ["", f"## {api}: {paths}", "", "| field | |", "|---|---|"]
        lines += [f"| `{field.name}` | {_told(field)} |" for field in sorted(fields, key=lambda field: field.name)]
    return "\n".join(lines) + "\n"


def _told(field: Field) -> str:
    mark = " (extension)" if field.is_extension else ""
    if field.harmless is not None:
        harmless = ", ".join(f"`{msgspec.json.encode(value).decode()}`" for value in (None, *field.harmless))
        return f"refused by name, unless {harmless}{mark}"
    return {
        "honoured": "honoured",
        "no effect": "accepted; says something about the request and changes nothing of the answer",
        "not offered": "refused by name",
        "refused": "not offered: refused as unknown",
    }[field.state] + mark


if __name__ == "__main__":
    print(markdown(), end="")
