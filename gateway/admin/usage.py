"""/admin/v1/usage: what was used, summed up as asked; /admin/v1/usage/requests: every request, as one download.

An admin sees all, also of tenants that are gone; a tenant's own admins see their tenant's.
"""

import csv
import io
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

import msgspec
from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.response import Stream
from msgspec import Struct

from loraplex.auth.caller import Caller
from loraplex.auth.errors import TenantNotFound
from loraplex.auth.ledger.rows import SUMS
from loraplex.auth.ledger.usage import DIMENSIONS, Dimension, Scope, Usage
from loraplex.auth.metering import UsageRecord
from loraplex.gateway.decoding import Query
from loraplex.gateway.guards import caller_of, require_tenant_admin
from loraplex.gateway.replies import json_reply

_COLUMNS: dict[str, Dimension] = {"day": "day", "tenant": "tenant_id", "key": "key_id", "model": "model"}
_FOREVER = 4e9  # a time that nobody's request begins at


class _Filter(Struct, forbid_unknown_fields=True, kw_only=True):
    """Whose, of which models, and of which UTC days, both included; all that is not named is open."""

    tenant_id: list[str] | None = None
    key_id: list[str] | None = None
    model: list[str] | None = None
    first_day: date | None = None
    last_day: date | None = None
    format: Literal["json", "csv"] = "json"

    def scope(self, caller: Caller) -> Scope:
        """Raises TenantNotFound where a tenant's admin asks for another's."""
        tenant_ids = self.tenant_id
        if caller.role != "admin":
            foreign = [tenant_id for tenant_id in tenant_ids or () if tenant_id != caller.tenant_id]
            if foreign:
                raise TenantNotFound(f"There is no tenant {foreign[0]!r}.")
            tenant_ids = [caller.tenant_id]
        return Scope(tenant_ids=_open(tenant_ids), key_ids=_open(self.key_id), models=_open(self.model))


class SumsQuery(_Filter, forbid_unknown_fields=True, kw_only=True):
    """What to sum by; everything together where nothing is named."""

    group_by: list[Literal["day", "tenant", "key", "model"]] = []


class RequestsQuery(_Filter, forbid_unknown_fields=True, kw_only=True):
    pass


class UsageList(Struct):
    data: list[Any]


_sums_query = Query(SumsQuery)
_requests_query = Query(RequestsQuery)


def usage_routes(usage: Usage) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    @get("/admin/v1/usage", guards=[require_tenant_admin])
    async def get_usage(request: Request[Any, Any, Any]) -> Response[bytes]:
        query = _sums_query.of(request)
        by = [name for name in DIMENSIONS if name in {_COLUMNS[word] for word in query.group_by}]
        found = await usage.by_day(query.scope(caller_of(request)), _text(query.first_day), _text(query.last_day), by)
        if query.format == "json":
            return json_reply(UsageList(found))
        return Response(_csv([*by, *SUMS], found, with_header=True), media_type="text/csv")

    @get("/admin/v1/usage/requests", guards=[require_tenant_admin])
    async def get_requests(request: Request[Any, Any, Any]) -> Stream:
        query = _requests_query.of(request)
        since, until = _midnight(query.first_day, 0.0), _midnight(query.last_day, _FOREVER, num_days=1)
        pages = usage.requests(query.scope(caller_of(request)), since, until)
        first = await anext(pages)  # an error comes before the status
        write = _json_pages if query.format == "json" else _csv_pages
        media_type = "application/json" if query.format == "json" else "text/csv"
        return Stream(write(first, pages), media_type=media_type)

    return [get_usage, get_requests]


async def _json_pages(page: list[UsageRecord], rest: AsyncIterator[list[UsageRecord]]) -> AsyncIterator[bytes]:
    yield b'{"data":['
    separator = b""
    while page:
        yield separator + b",".join(msgspec.json.encode(record) for record in page)
        separator = b","
        page = await anext(rest, [])
    yield b"]}"


async def _csv_pages(page: list[UsageRecord], rest: AsyncIterator[list[UsageRecord]]) -> AsyncIterator[bytes]:
    fields = UsageRecord.__struct_fields__
    yield _csv(fields, [], with_header=True)
    while page:
        yield _csv(fields, page)
        page = await anext(rest, [])


def _csv(fields: Sequence[str], rows: Sequence[Struct], *, with_header: bool = False) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    if with_header:
        writer.writerow(fields)
    writer.writerows([getattr(row, field) for field in fields] for row in rows)
    return text.getvalue().encode()


def _open(values: list[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)


def _text(day: date | None) -> str | None:
    return None if day is None else day.isoformat()


def _midnight(day: date | None, otherwise: float, num_days: int = 0) -> float:
    """When the day begins, or one so many days later."""
    if day is None:
        return otherwise
    return datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() + timedelta(days=num_days).total_seconds()
