"""docs/api-compatibility.md, made from the structs that decode requests and from the clients' own types:

PYTHONPATH=.src:tests python -m support.compatibility > docs/api-compatibility.md
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
from openai.types.batch_create_params import BatchCreateParams
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams
from openai.types.embedding_create_params import EmbeddingCreateParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase as ResponseParams

from loraplex.gateway.lorax.wire import LoraxRequest, Parameters
from loraplex.gateway.openai.batches import NewBatch
from loraplex.gateway.openai.chat_wire import ChatRequest
from loraplex.gateway.openai.completions import CompletionRequest
from loraplex.gateway.openai.embeddings import EmbeddingRequest
from loraplex.gateway.openai.responses_request import ResponseRequest
from loraplex.gateway.vllm.adapters import LoadLoraAdapter, UnloadLoraAdapter

SAID_ONLY = {"user", "safety_identifier", "prompt_cache_key", "lora_int_id"}
# (API, what is offered, what is not and how that is told)
ROUTES = (
    (
        "OpenAI",
        "`/v1/chat/completions`, `/v1/completions`, `/v1/responses` (create, stream, get, delete, input items, input "
        "tokens), `/v1/embeddings`, `/v1/models`, `/v1/files`, `/v1/batches`",
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


@dataclass(frozen=True)
class Surface:
    """One request of an API: the path it goes to, its struct, and the names that its own clients know."""

    api: str
    path: str
    struct: type[msgspec.Struct]
    required: dict[str, Any]
    theirs: frozenset[str] = field(default_factory=frozenset)
    refused: frozenset[str] = field(default_factory=frozenset)  # by the route's own words rather than by the table
    inside: str = ""  # the field of the body that the struct is

    @property
    def title(self) -> str:
        return f"{self.api}: `POST {self.path}`" + (f", `{self.inside}`" if self.inside else "")


def _names(params: type) -> frozenset[str]:
    """The names of a TypedDict."""
    return frozenset(params.__annotations__)


CHAT = {"model": "echo-base", "messages": [{"role": "user", "content": "x"}]}
SURFACES = (
    Surface("OpenAI", "/v1/chat/completions", ChatRequest, CHAT, _names(ChatParams)),
    Surface("OpenAI", "/v1/completions", CompletionRequest, {"model": "echo-base", "prompt": "x"}, _names(TextParams)),
    Surface("OpenAI", "/v1/responses", ResponseRequest, {"model": "echo-base", "input": "x"}, _names(ResponseParams)),
    Surface("OpenAI", "/v1/embeddings", EmbeddingRequest, {"model": "echo-base", "input": "x"},
            _names(EmbeddingCreateParams)),
    Surface("OpenAI", "/v1/batches", NewBatch, {"input_file_id": "x", "endpoint": "/v1/embeddings",
            "completion_window": "24h"}, _names(BatchCreateParams)),
    Surface("LoRAX", "/generate", LoraxRequest, {"inputs": "x"}),
    Surface("LoRAX", "/generate", Parameters, {"inputs": "x"}, inside="parameters",
            refused=frozenset({"watermark", "apply_chat_template"})),
    Surface("vLLM", "/v1/load_lora_adapter", LoadLoraAdapter, {"lora_name": "x", "lora_path": "/x"}),
    Surface("vLLM", "/v1/unload_lora_adapter", UnloadLoraAdapter, {"lora_name": "x"}),
)  # fmt: skip


def rows(surface: Surface) -> dict[str, str]:
    """Of each field: honoured, said only, or refused, and at which values it is harmless."""
    told: dict[str, str] = {}
    not_offered: dict[str, tuple[Any, ...]] = getattr(surface.struct, "not_offered", {})
    for one in msgspec.structs.fields(surface.struct):
        name = one.encode_name
        if name in not_offered:
            harmless = ", ".join(f"`{msgspec.json.encode(value).decode()}`" for value in (None, *not_offered[name]))
            told[name] = f"refused by name, unless {harmless}"
        elif name in surface.refused:
            told[name] = "refused by name"
        elif name in SAID_ONLY:
            told[name] = "accepted; says something about the request and changes nothing of the answer"
        else:
            told[name] = "honoured"
    for name in surface.theirs - told.keys():
        told[name] = "not offered: refused as unknown"
    return told


def markdown() -> str:
    """The page."""
    lines = [
        "# What of each API is offered",
        "",
        "Field by field. A field that is not in a table is refused as unknown, with its name; nothing is accepted and",
        "ignored. Made by `python -m support.compatibility`; a test compares this page with the code, and sends the",
        "server each field that is refused.",
        "",
        "| API | offered | not offered |",
        "|---|---|---|",
        *(f"| {api} | {offered} | {not_offered} |" for api, offered, not_offered in ROUTES),
    ]
    for surface in SURFACES:
        lines += ["", f"## {surface.title}", "", "| field | |", "|---|---|"]
        ours = sorted(rows(surface).items())
        mark = {name: "" if not surface.theirs or name in surface.theirs else " (extension)" for name, _ in ours}
        lines += [f"| `{name}` | {what}{mark[name]} |" for name, what in ours]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
