"""What each route takes and gives, as the structs that its handler decodes and encodes."""

from typing import Any

import msgspec

from loraplex.auth.admin_keys import AdminKey
from loraplex.auth.limits.policy import Limits
from loraplex.auth.tenants import ApiKey, Tenant
from loraplex.engines.protocol import EngineInfo, Health
from loraplex.engines.stats import EngineStats
from loraplex.gateway.admin import adapters, admin_keys, audit, keys, limits, routes, secrets, tenants, usage
from loraplex.gateway.admin.adapter_views import AdapterList, AdapterView, VersionView
from loraplex.gateway.lorax.embed import EmbedResponse, LoraxEmbedRequest
from loraplex.gateway.lorax.info import Info
from loraplex.gateway.lorax.replies import GenerateResponse, StreamResponse
from loraplex.gateway.lorax.tokens import PlacedToken, TokenizeInputs
from loraplex.gateway.lorax.wire import LoraxRequest
from loraplex.gateway.openai import batches, embeddings, files, models, responses
from loraplex.gateway.openai import usage as openai_usage
from loraplex.gateway.openai.chat_wire import ChatCompletion, ChatRequest
from loraplex.gateway.openai.completions import Completion, CompletionRequest
from loraplex.gateway.openai.responses_request import ResponseRequest
from loraplex.gateway.openai.responses_stream import Response
from loraplex.gateway.vllm.adapters import LoadLoraAdapter, UnloadLoraAdapter, Version
from loraplex.gateway.vllm.tokens import Detokenize, Text, TokenizeChat, TokenizeText, Tokens

READS = (401, 403)
WRITES = (400, 401, 403, 413)
GENERATES = (400, 401, 403, 404, 409, 413, 422, 429, 500, 503, 504)


class Upload(msgspec.Struct, kw_only=True):
    """A form, as multipart/form-data. `file` holds the bytes; the fields of an expiry come both or not at all."""

    file: bytes
    purpose: str = "batch"


class AdapterFile(msgspec.Struct):
    """A form, as multipart/form-data: one part for each of PEFT's files, each under its own file name."""

    file: bytes


class UploadQuery(msgspec.Struct, kw_only=True):
    """`update` makes a new version of an adapter that is there, `dry_run` only says what would be found."""

    name: str
    tenant_id: str | None = None
    update: bool = False
    dry_run: bool = False
    wait: bool = True


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One route. `answer` is a struct, or the media type of something that is none; None where there is no body.

    Where there are several kinds of body or answer, a tuple of them.
    """

    body: Any = None
    form: Any = None
    query: Any = None
    answer: Any = None
    text: str | None = None  # the media type of an answer that is asked for instead
    frames: Any = None  # what one event of a stream holds, where the answer may stream
    errors: tuple[int, ...] = READS
    example: dict[str, Any] | None = None


def _admin(*errors: int, **fields: Any) -> Operation:
    return Operation(errors=tuple(sorted({*READS, *errors})), **fields)


_CHAT = {"model": "pirate", "messages": [{"role": "user", "content": "Where is the treasure?"}]}
_TENANT = "/admin/v1/tenants/{tenant_id}"
_KEY = f"{_TENANT}/keys/{{key_id}}"
_RESPONSE = "/v1/responses/{response_id}"
_BATCH = {
    "input_file_id": "file-0123456789abcdef01234567",
    "endpoint": "/v1/chat/completions",
    "completion_window": "24h",
}
_LORAX = {"inputs": "Where is the treasure?", "parameters": {"adapter_id": "pirate", "max_new_tokens": 20}}

OPERATIONS: dict[str, Operation] = {
    "POST /v1/chat/completions": Operation(
        body=ChatRequest, answer=ChatCompletion, frames=dict[str, Any], errors=GENERATES, example=_CHAT
    ),
    "POST /v1/completions": Operation(
        body=CompletionRequest,
        answer=Completion,
        frames=Completion,
        errors=GENERATES,
        example={"model": "pirate", "prompt": "Once upon a time", "max_tokens": 20},
    ),
    "POST /v1/embeddings": Operation(
        body=embeddings.EmbeddingRequest,
        answer=embeddings.EmbeddingList,
        errors=GENERATES,
        example={"model": "pirate", "input": ["Ahoy", "Farewell"]},
    ),
    "POST /v1/responses": Operation(
        body=ResponseRequest,
        answer=Response,
        frames=dict[str, Any],
        errors=GENERATES,
        example={"model": "pirate", "input": "Where is the treasure?"},
    ),
    "POST /v1/responses/input_tokens": Operation(
        body=ResponseRequest,
        answer=responses.InputTokens,
        errors=GENERATES,
        example={"model": "pirate", "input": "Ahoy"},
    ),
    "POST /v1/responses/compact": Operation(errors=(400, 401, 403, 409, 422)),
    f"GET {_RESPONSE}": Operation(answer=Response, errors=(400, 401, 403, 404)),
    f"DELETE {_RESPONSE}": Operation(answer=responses.DeletedResponse, errors=(401, 403, 404)),
    f"POST {_RESPONSE}/cancel": Operation(errors=(400, 401, 403, 404, 409, 422)),
    f"GET {_RESPONSE}/input_items": Operation(answer=responses.ItemList, errors=(400, 401, 403, 404)),
    "POST /tokenize": Operation(
        body=(TokenizeText, TokenizeChat, TokenizeInputs),
        answer=(Tokens, list[PlacedToken]),
        errors=(*WRITES, 404, 409, 422, 503),
        example={"prompt": "Ahoy"},
    ),
    "POST /detokenize": Operation(
        body=Detokenize, answer=Text, errors=(*WRITES, 404, 409, 422, 503), example={"tokens": [72, 105]}
    ),
    "POST /v1/load_lora_adapter": _admin(
        400,
        404,
        409,
        413,
        422,
        503,
        body=LoadLoraAdapter,
        answer="text/plain",
        example={"lora_name": "pirate", "lora_path": "/adapters/pirate"},
    ),
    "POST /v1/unload_lora_adapter": _admin(
        400, 404, 409, 413, 422, body=UnloadLoraAdapter, answer="text/plain", example={"lora_name": "pirate"}
    ),
    "GET /version": Operation(answer=Version, errors=()),
    "POST /ping": Operation(answer=Health, errors=(503,)),
    "POST /embed": Operation(
        body=LoraxEmbedRequest, answer=EmbedResponse, errors=GENERATES, example={"inputs": "Ahoy"}
    ),
    "GET /v1/models": Operation(answer=models.ModelList),
    "GET /v1/models/{name}": Operation(answer=models.ModelCard, errors=(401, 403, 404)),
    "DELETE /v1/models/{name}": _admin(400, 404, 409, answer=models.ModelDeleted),
    "POST /v1/files": Operation(form=Upload, answer=files.FileObject, errors=WRITES),
    "GET /v1/files": Operation(query=files.FileQuery, answer=files.FileList, errors=(400, 401, 403, 404)),
    "GET /v1/files/{file_id}": Operation(answer=files.FileObject, errors=(401, 403, 404)),
    "GET /v1/files/{file_id}/content": Operation(answer="application/octet-stream", errors=(401, 403, 404)),
    "DELETE /v1/files/{file_id}": Operation(answer=files.FileDeleted, errors=(401, 403, 404, 409)),
    "POST /v1/batches": Operation(
        body=batches.NewBatch, answer=batches.BatchObject, errors=(400, 401, 403, 404, 413), example=_BATCH
    ),
    "GET /v1/batches": Operation(query=batches.BatchQuery, answer=batches.BatchList, errors=(400, 401, 403, 404)),
    "GET /v1/batches/{batch_id}": Operation(answer=batches.BatchObject, errors=(401, 403, 404)),
    "POST /v1/batches/{batch_id}/cancel": Operation(
        answer=batches.BatchObject, errors=(400, 401, 403, 404, 409, 413, 422)
    ),
    "GET /v1/organization/usage/completions": Operation(
        query=openai_usage.UsageQuery, answer=openai_usage.UsagePage, errors=(400, 401, 403, 404)
    ),
    "GET /health": Operation(answer=Health, errors=(503,)),
    "GET /ping": Operation(answer=Health, errors=(503,)),
    "GET /metrics": Operation(answer="text/plain", errors=READS),
    "GET /": Operation(answer=Health, errors=(503,)),
    "GET /startup": Operation(answer=Health, errors=(500, 503)),
    "GET /info": Operation(answer=Info, errors=(401, 403, 503)),
    "POST /": Operation(
        body=LoraxRequest, answer=list[GenerateResponse], frames=StreamResponse, errors=GENERATES, example=_LORAX
    ),
    "POST /invocations": Operation(
        body=LoraxRequest, answer=list[GenerateResponse], frames=StreamResponse, errors=GENERATES, example=_LORAX
    ),
    "POST /generate": Operation(body=LoraxRequest, answer=GenerateResponse, errors=GENERATES, example=_LORAX),
    "POST /generate_stream": Operation(body=LoraxRequest, frames=StreamResponse, errors=GENERATES, example=_LORAX),
    "POST /classify": Operation(errors=(401, 403, 422)),
    "POST /classify_batch": Operation(errors=(401, 403, 422)),
    "POST /admin/v1/tenants": _admin(400, 409, 413, body=tenants.NewTenant, answer=Tenant, example={"name": "acme"}),
    "GET /admin/v1/tenants": _admin(answer=tenants.TenantList),
    f"GET {_TENANT}": _admin(404, answer=Tenant),
    f"DELETE {_TENANT}": _admin(404),
    f"POST {_TENANT}/keys": _admin(400, 404, 413, body=keys.NewKey, answer=ApiKey, example={"name": "laptop"}),
    f"GET {_TENANT}/keys": _admin(404, answer=keys.KeyList),
    f"GET {_KEY}": _admin(404, answer=ApiKey),
    f"DELETE {_KEY}": _admin(404),
    f"POST {_KEY}/rotate": _admin(400, 404, 413, body=keys.Rotation, answer=ApiKey, example={"overlap_seconds": 3600}),
    f"GET {_KEY}/limits": _admin(404, answer=limits.LimitsView),
    f"PUT {_KEY}/limits": _admin(400, 404, 413, body=Limits, answer=limits.LimitsView),
    f"GET {_TENANT}/limits": _admin(404, answer=limits.LimitsView),
    f"PUT {_TENANT}/limits": _admin(
        400, 404, 413, body=Limits, answer=limits.LimitsView, example={"requests_per_minute": 600}
    ),
    f"GET {_TENANT}/secrets": _admin(404, answer=secrets.SecretList),
    f"PUT {_TENANT}/secrets/{{name}}": _admin(400, 404, 413, body=secrets.SecretValue),
    f"DELETE {_TENANT}/secrets/{{name}}": _admin(400, 404),
    "POST /admin/v1/admin-keys": _admin(400, 413, body=admin_keys.NewAdminKey, answer=AdminKey),
    "GET /admin/v1/admin-keys": _admin(answer=admin_keys.AdminKeyList),
    "DELETE /admin/v1/admin-keys/{key_id}": _admin(404, 409),
    "GET /admin/v1/audit": _admin(400, query=audit.AuditQuery, answer=audit.AuditPage),
    f"GET {_TENANT}/audit": _admin(400, 404, query=audit.AuditQuery, answer=audit.AuditPage),
    "POST /admin/v1/adapters": _admin(
        400,
        404,
        409,
        413,
        503,
        body=adapters.NewAdapter,
        answer=AdapterView,
        example={"name": "pirate", "source": "hf://org/pirate"},
    ),
    "GET /admin/v1/adapters": _admin(400, 404, query=adapters.AdapterQuery, answer=AdapterList),
    "POST /admin/v1/adapters/validate": _admin(400, 404, 413, 503, body=adapters.Examined, answer=VersionView),
    "POST /admin/v1/adapters/upload": _admin(
        400, 404, 408, 409, 413, 503, form=AdapterFile, query=UploadQuery, answer=AdapterView
    ),
    "GET /admin/v1/adapters/{name}": _admin(400, 404),
    "PATCH /admin/v1/adapters/{name}": _admin(400, 404, 409, 413, 503, body=adapters.AdapterChange, answer=AdapterView),
    "POST /admin/v1/adapters/{name}": _admin(400, 404, 405, 409, 413, 503, body=adapters.ChosenVersion),
    "DELETE /admin/v1/adapters/{name}": _admin(400, 404, 409),
    "POST /admin/v1/routes": _admin(400, 404, 409, 413, body=routes.NewRoute, answer=routes.RouteView),
    "GET /admin/v1/routes": _admin(400, 404, answer=routes.RouteList),
    "GET /admin/v1/routes/{name}": _admin(400, 404, answer=routes.RouteView),
    "PUT /admin/v1/routes/{name}": _admin(400, 404, 409, 413, body=routes.OtherTargets, answer=routes.RouteView),
    "DELETE /admin/v1/routes/{name}": _admin(400, 404, 409),
    "GET /admin/v1/usage": _admin(400, 404, query=usage.SumsQuery, answer=usage.UsageList, text="text/csv"),
    "GET /admin/v1/usage/requests": _admin(400, 404, query=usage.RequestsQuery),
    "GET /admin/v1/engine": _admin(503, answer=EngineInfo),
    "GET /admin/v1/engine/stats": _admin(503, answer=EngineStats),
    "POST /admin/v1/engine/reload": _admin(400, 413, 500, 503, answer=EngineInfo),
    "GET /openapi.json": Operation(answer=dict[str, Any], errors=()),
    "GET /docs": Operation(answer="text/html", errors=()),
    "GET /docs/{name}": Operation(answer="text/css", errors=(404,)),
}
