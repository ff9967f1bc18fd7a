"""/v1/batches: create, list, show, cancel. The work itself is `gateway/batches/`."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, Response, get, post
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from loraplex.gateway.batches.records import Batch, BatchProblem, BatchRecords, Endpoint, Status
from loraplex.gateway.decoding import Body, Query
from loraplex.gateway.guards import caller_of, require_inference
from loraplex.gateway.replies import json_reply

Metadata = Annotated[
    dict[
        Annotated[str, msgspec.Meta(max_length=64)],
        Annotated[str, msgspec.Meta(max_length=512, pattern=r"^[^\x00]*$")],
    ],
    msgspec.Meta(max_length=16),
]


class OutputExpiry(Struct, forbid_unknown_fields=True):
    anchor: Literal["created_at"]
    seconds: Annotated[int, msgspec.Meta(ge=3600, le=30 * 86400)]


class NewBatch(Struct, forbid_unknown_fields=True):
    """The input is a file of one request a line: {custom_id, method, url, body}."""

    input_file_id: str
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: OutputExpiry | None = None


class RequestCounts(Struct):
    total: int
    completed: int
    failed: int


class CachedTokens(Struct):
    cached_tokens: int


class ReasoningTokens(Struct):
    reasoning_tokens: int


class BatchUsage(Struct):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class BatchErrors(Struct):
    data: list[BatchProblem]
    object: Literal["list"] = "list"


class BatchObject(Struct, kw_only=True):
    """A batch as OpenAI shows it. Times are seconds since 1970."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None = None


class BatchList(Struct):
    """One page, newest first. `first_id` and `last_id` are cursors."""

    data: list[BatchObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"] = "list"


class BatchQuery(Struct, forbid_unknown_fields=True):
    after: str | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = 20


_new_batch = Body(NewBatch)
_query = Query(BatchQuery)


def batch_routes(records: BatchRecords, notice: Callable[[], None]) -> list[HTTPRouteHandler]:
    """The handlers of this resource; `notice` tells the runner that there is something to do."""

    @post("/v1/batches", status_code=200, guards=[require_inference])
    async def create_batch(request: Request[Any, Any, Any]) -> Response[bytes]:
        wanted = await _new_batch.of(request)
        kept_seconds = wanted.output_expires_after.seconds if wanted.output_expires_after else None
        batch = await records.create(
            caller_of(request), wanted.endpoint, wanted.input_file_id, wanted.metadata, kept_seconds
        )
        notice()
        return json_reply(_shown(batch))

    @get("/v1/batches", guards=[require_inference])
    async def list_batches(request: Request[Any, Any, Any]) -> Response[bytes]:
        wanted = _query.of(request)
        page, has_more = await records.page(caller_of(request).tenant_id, after=wanted.after, limit=wanted.limit)
        first, last = (page[0].id, page[-1].id) if page else (None, None)
        return json_reply(BatchList([_shown(batch) for batch in page], has_more, first, last))

    @get("/v1/batches/{batch_id:str}", guards=[require_inference])
    async def retrieve_batch(request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_reply(_shown(await records.get(caller_of(request).tenant_id, request.path_params["batch_id"])))

    @post("/v1/batches/{batch_id:str}/cancel", status_code=200, guards=[require_inference])
    async def cancel_batch(request: Request[Any, Any, Any]) -> Response[bytes]:
        batch = await records.cancel(caller_of(request).tenant_id, request.path_params["batch_id"])
        notice()
        return json_reply(_shown(batch))

    return [create_batch, list_batches, retrieve_batch, cancel_batch]


def _shown(batch: Batch) -> BatchObject:
    def at(status: Status) -> int | None:
        moment = batch.moments.get(status)
        return None if moment is None else int(moment)

    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        errors=BatchErrors(batch.errors) if batch.errors else None,
        input_file_id=batch.input_file_id,
        status=batch.status,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=int(batch.created_at),
        expires_at=int(batch.expires_at),
        request_counts=RequestCounts(batch.num_total, batch.num_completed, batch.num_failed),
        usage=BatchUsage(
            batch.num_prompt_tokens,
            CachedTokens(batch.num_cached_tokens),
            batch.num_completion_tokens,
            ReasoningTokens(batch.num_reasoning_tokens),
            batch.num_prompt_tokens + batch.num_completion_tokens,
        ),
        metadata=batch.details,
        in_progress_at=at("in_progress"),
        finalizing_at=at("finalizing"),
        completed_at=at("completed"),
        failed_at=at("failed"),
        expired_at=at("expired"),
        cancelling_at=at("cancelling"),
        cancelled_at=at("cancelled"),
    )
