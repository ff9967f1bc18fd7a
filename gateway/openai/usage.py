"""GET /v1/organization/usage/completions: tokens over time, as OpenAI tells them. A tenant is a project.

An admin key sees every tenant, a tenant's admin the tenant, an inference key what it used itself.
"""

import time
from collections import defaultdict
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from loraplex.auth.caller import Caller
from loraplex.auth.ledger.rows import day_of
from loraplex.auth.ledger.usage import Dimension, Scope, Sums, Usage
from loraplex.gateway.decoding import Query
from loraplex.gateway.errors import MalformedRequest, UnsupportedParameter
from loraplex.gateway.guards import caller_of, require_inference
from loraplex.gateway.replies import json_reply

Width = Literal["1m", "1h", "1d"]
Seconds = Annotated[int, msgspec.Meta(ge=0, le=4_000_000_000)]

_WIDTHS: dict[Width, tuple[int, int, int]] = {  # seconds, buckets unless said otherwise, most buckets of one page
    "1m": (60, 60, 1440),
    "1h": (3600, 24, 168),
    "1d": (86400, 7, 31),
}
_COLUMNS: dict[str, Dimension] = {"project_id": "tenant_id", "api_key_id": "key_id", "model": "model"}


class UsageQuery(Struct, forbid_unknown_fields=True, kw_only=True):
    """OpenAI's parameters; those that this server knows nothing of are refused."""

    start_time: Seconds
    end_time: Seconds | None = None
    bucket_width: Width = "1d"
    limit: Annotated[int, msgspec.Meta(ge=1, le=1440)] | None = None
    page: str | None = None
    group_by: list[Literal["project_id", "api_key_id", "model", "user_id", "batch", "service_tier", "api_source"]] = []
    project_ids: list[str] | None = None
    api_key_ids: list[str] | None = None
    models: list[str] | None = None
    user_ids: list[str] | None = None
    batch: str | None = None

    def check(self) -> None:
        """Raises UnsupportedParameter or MalformedRequest."""
        for name in ("user_ids", "batch"):
            if getattr(self, name) is not None:
                raise UnsupportedParameter(f"{name} is not supported by this server.", name)
        for word in self.group_by:
            if word not in _COLUMNS:
                raise UnsupportedParameter(f"group_by {word} is not supported by this server.", "group_by")
        if self.end_time is not None and self.end_time <= self.start_time:
            raise MalformedRequest("end_time must be after start_time.", "end_time")
        most = _WIDTHS[self.bucket_width][2]
        if (self.limit or 1) > most:
            raise MalformedRequest(f"limit must be at most {most} for a bucket_width of {self.bucket_width}.", "limit")

    def scope(self, caller: Caller) -> Scope:
        """What the caller may see of what was asked for; what is not its own looks unused."""
        projects, keys = self.project_ids, self.api_key_ids
        if caller.role != "admin":
            projects = [caller.tenant_id] if projects is None or caller.tenant_id in projects else []
        if caller.role == "inference":
            keys = [caller.key_id] if keys is None or caller.key_id in keys else []
        return Scope(tenant_ids=_open(projects), key_ids=_open(keys), models=_open(self.models))

    def begin(self) -> int:
        """Of the first bucket of the page. Raises MalformedRequest for a page that is none of ours."""
        seconds = _WIDTHS[self.bucket_width][0]
        if self.page is None:
            return self.start_time // seconds * seconds
        number = self.page.removeprefix("page_")
        if not (number.isascii() and number.isdecimal()) or len(number) > 10 or int(number) % seconds:
            raise MalformedRequest(f"There is no page {self.page!r}; pages are named in next_page.", "page")
        return int(number)


class UsageResult(Struct, kw_only=True):
    """What was not grouped by is null."""

    object: Literal["organization.usage.completions.result"] = "organization.usage.completions.result"
    input_tokens: int
    output_tokens: int
    input_cached_tokens: int
    num_model_requests: int
    project_id: str | None
    api_key_id: str | None
    model: str | None
    user_id: None = None
    batch: None = None


class Bucket(Struct, kw_only=True):
    object: Literal["bucket"] = "bucket"
    start_time: int
    end_time: int
    results: list[UsageResult]


class UsagePage(Struct, kw_only=True):
    object: Literal["page"] = "page"
    data: list[Bucket]
    has_more: bool
    next_page: str | None


_query = Query(UsageQuery)


def completion_usage_routes(usage: Usage) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    @get("/v1/organization/usage/completions", guards=[require_inference])
    async def get_completion_usage(request: Request[Any, Any, Any]) -> Response[bytes]:
        query = _query.of(request)
        query.check()
        seconds, usual, _ = _WIDTHS[query.bucket_width]
        end = query.end_time if query.end_time is not None else int(time.time()) + 1
        begins = range(query.begin(), max(end, query.begin()), seconds)
        page, rest = begins[: query.limit or usual], begins[query.limit or usual :]
        found = await _found(usage, query, query.scope(caller_of(request)), page, end)
        buckets = [
            Bucket(
                start_time=begin, end_time=min(begin + seconds, end), results=[_result(sums) for sums in found[begin]]
            )
            for begin in page
        ]
        next_page = f"page_{rest[0]}" if rest else None
        return json_reply(UsagePage(data=buckets, has_more=next_page is not None, next_page=next_page))

    return [get_completion_usage]


async def _found(usage: Usage, query: UsageQuery, scope: Scope, page: range, end: int) -> dict[int, list[Sums]]:
    """By the begin of their bucket. Whole days come from the sums that are kept for ever."""
    found: dict[int, list[Sums]] = defaultdict(list)
    if not page:
        return found
    by = [column for word, column in _COLUMNS.items() if word in query.group_by]
    since, until = max(page[0], query.start_time), min(page[-1] + page.step, end)
    if query.bucket_width != "1d":
        for sums in await usage.by_time(scope, since, until, page.step, by):
            assert sums.since is not None
            found[sums.since].append(sums)
        return found
    begins = {day_of(begin): begin for begin in page}
    for sums in await usage.by_day(scope, day_of(page[0]), day_of(page[-1]), ["day", *by]):
        assert sums.day is not None
        found[begins[sums.day]].append(sums)
    return found


def _result(sums: Sums) -> UsageResult:
    return UsageResult(
        input_tokens=sums.num_prompt_tokens,
        output_tokens=sums.num_completion_tokens,
        input_cached_tokens=sums.num_cached_tokens,
        num_model_requests=sums.num_requests,
        project_id=sums.tenant_id,
        api_key_id=sums.key_id,
        model=sums.model,
    )


def _open(values: list[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)
