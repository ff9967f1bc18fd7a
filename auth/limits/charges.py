"""What one request takes from each limit that holds for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from loraplex.auth.caller import Caller
from loraplex.auth.errors import LimitReached, QuotaSpent, RequestsLimited, TokensLimited
from loraplex.auth.limits.policy import Limits

# A rate refills continuously and holds at most a minute's worth; slots come back; a budget ends with its period.
Family = Literal["rate", "slots", "budget"]
Kind = Literal["requests", "input_tokens", "output_tokens", "concurrent", "day", "month"]
RATE_SECONDS = 60.0

_WORDS: dict[Kind, str] = {
    "requests": "requests per minute",
    "input_tokens": "prompt tokens per minute",
    "output_tokens": "generated tokens per minute",
    "concurrent": "requests at the same time",
    "day": "tokens per day",
    "month": "tokens per month",
}


class Charge(NamedTuple):
    """An amount of one limit. `bucket` names what is counted; a budget counts from `since` to `until`."""

    bucket: str
    family: Family
    kind: Kind
    limit: int
    amount: int
    tenant_id: str
    key_id: str | None
    since: float = 0.0
    until: float = 0.0


class Standing(NamedTuple):
    """How a limit stands after a request was admitted; `reset_seconds` until all of it is there again."""

    limit: int
    remaining: int
    reset_seconds: float


def charges(caller: Caller, num_prompt_tokens: int, num_output_tokens: int, now: float) -> list[Charge]:
    """The limits of the tenant, then the key's own. An admin has none."""
    if not caller.tenant_id:
        return []
    found: list[Charge] = []
    for key_id, limits in ((None, caller.policy.tenant), (caller.key_id, caller.policy.key)):
        found += _charges(caller.tenant_id, key_id, limits, num_prompt_tokens, num_output_tokens, now)
    return found


def more_output(caller: Caller, num_tokens: int, now: float) -> list[Charge]:
    """What so many more generated tokens take."""
    return [
        charge for charge in charges(caller, 0, num_tokens, now) if charge.kind in ("output_tokens", "day", "month")
    ]


def _charges(
    tenant_id: str, key_id: str | None, limits: Limits, num_prompt: int, num_output: int, now: float
) -> list[Charge]:
    amounts: Sequence[tuple[Kind, Family, int | None, int]] = (
        ("requests", "rate", limits.requests_per_minute, 1),
        ("input_tokens", "rate", limits.input_tokens_per_minute, num_prompt),
        ("output_tokens", "rate", limits.output_tokens_per_minute, num_output),
        ("concurrent", "slots", limits.concurrent_requests, 1),
        ("day", "budget", limits.tokens_per_day, num_prompt + num_output),
        ("month", "budget", limits.tokens_per_month, num_prompt + num_output),
    )
    found = []
    for kind, family, limit, amount in amounts:
        if limit is None:
            continue
        since, until = period(kind, now) if family == "budget" else (0.0, 0.0)
        bucket = _bucket(tenant_id, key_id, kind, since)
        found.append(Charge(bucket, family, kind, limit, amount, tenant_id, key_id, since, until))
    return found


def budgets(tenant_id: str, key_id: str | None, now: float) -> list[Charge]:
    """The budgets that a tenant or a key may have now, with nothing taken from them."""
    kinds: tuple[Kind, ...] = ("day", "month")
    found = []
    for kind in kinds:
        since, until = period(kind, now)
        bucket = _bucket(tenant_id, key_id, kind, since)
        found.append(Charge(bucket, "budget", kind, 0, 0, tenant_id, key_id, since, until))
    return found


def _bucket(tenant_id: str, key_id: str | None, kind: Kind, since: float) -> str:
    """What shares a tenant in braces shares a slot of a Redis cluster."""
    return f"{{{tenant_id}}}:{key_id or ''}:{kind}" + (f":{since:.0f}" if since else "")


def period(kind: Kind, now: float) -> tuple[float, float]:
    """The UTC day or month that a time lies in, as [since, until)."""
    if kind == "day":
        since = now // 86400 * 86400
        return since, since + 86400
    date = datetime.fromtimestamp(now, UTC)
    first = datetime(date.year, date.month, 1, tzinfo=UTC)
    following = datetime(date.year + date.month // 12, date.month % 12 + 1, 1, tzinfo=UTC)
    return first.timestamp(), following.timestamp()


def refusal(charge: Charge, wait_seconds: float, now: float) -> LimitReached:
    """The error for a charge that there is no room for; an infinite wait where nothing that comes back makes room."""
    whose = "this API key" if charge.key_id else "this tenant"
    limit = f"limit for {whose} is {charge.limit} {_WORDS[charge.kind]}"
    if charge.family == "budget":
        if math.isinf(wait_seconds):
            return QuotaSpent(f"The {limit}, and what is left of it is too little.", charge.until - now, is_final=True)
        held = "what is left of it is reserved by requests that are running"
        return QuotaSpent(f"The {limit}; {held}. Please try again in {wait_seconds:.3g} s.", wait_seconds)
    kind = TokensLimited if charge.kind.endswith("tokens") else RequestsLimited
    if math.isinf(wait_seconds):
        return kind(f"The {limit}; this request alone asks for {charge.amount}.", None, is_final=True)
    return kind(f"The {limit}. Please try again in {wait_seconds:.3g} s.", wait_seconds)
