"""Limits of a tenant and of a key, and what both together mean for a caller.

A key without a limit of its own has only its tenant's, a tenant without one the server's default. Where both have one,
both hold: what is counted is counted for the key and for all keys of the tenant together.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cached_property
from ipaddress import ip_address, ip_network
from typing import Annotated

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Budget = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Pattern = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """None: no limit of its own. Rates are per minute; budgets are tokens of prompt and answer per UTC day and month.

    `allowed_models` are names in which `*` stands for anything; `allowed_ips` are addresses or networks; `expires_at`
    is seconds since 1970. `max_tokens` bounds the answer of one request. `weight` is the tenant's share of a full
    engine; a request of higher `priority` goes before others of its tenant. Tenants that say `shares_prefixes` share
    what the engine computed of prompts that begin alike; a first token's time may then tell one what others asked.
    `request_adapters` are addresses, `*` for anything, of which a request may name adapters that nobody registered:
    `hf://acme/*`, `s3://bucket/*`, `file:///srv/adapters/*`. Without any, none may be named.
    With `log_prompts` prompts and answers are kept in the server's log of prompts; of no one else are they.
    """

    allowed_models: Annotated[tuple[Pattern, ...], msgspec.Meta(max_length=256)] | None = None
    allowed_ips: Annotated[tuple[Pattern, ...], msgspec.Meta(max_length=256)] | None = None
    expires_at: float | None = None
    requests_per_minute: Positive | None = None
    input_tokens_per_minute: Positive | None = None
    output_tokens_per_minute: Positive | None = None
    concurrent_requests: Positive | None = None
    tokens_per_day: Budget | None = None
    tokens_per_month: Budget | None = None
    max_tokens: Positive | None = None
    weight: Annotated[float, msgspec.Meta(ge=0.01, le=100)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=-100, le=100)] | None = None
    shares_prefixes: bool | None = None
    request_adapters: Annotated[tuple[Pattern, ...], msgspec.Meta(max_length=256)] | None = None
    log_prompts: bool | None = None

    def check(self) -> None:
        """Raises ValueError for an address that is none."""
        for text in self.allowed_ips or ():
            ip_network(text)

    def over(self, defaults: Limits) -> Limits:
        """These limits, and the defaults where there is none."""
        own = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return msgspec.structs.replace(defaults, **own)


NO_LIMITS = Limits()


class Policy(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The limits that hold for one caller: its tenant's, defaults included, and its key's own.

    What both mean together is found out once, and asked by each of the caller's requests.
    """

    tenant: Limits = NO_LIMITS
    key: Limits = NO_LIMITS

    def may_use(self, model: str) -> bool:
        """Whether the patterns of both allow the model."""
        return all(
            limits.allowed_models is None or any(fnmatchcase(model, _literal(it)) for it in limits.allowed_models)
            for limits in (self.tenant, self.key)
        )

    @cached_property
    def request_adapters(self) -> tuple[str, ...]:
        """The tenant's patterns of addresses that requests may fetch adapters from."""
        return self.tenant.request_adapters or ()

    def may_fetch(self, address: str) -> bool:
        """Whether the tenant's patterns allow an adapter from this address, and the key's, if it has its own."""
        lists = [self.request_adapters, self.key.request_adapters]
        return all(
            any(fnmatchcase(address, _literal(pattern)) for pattern in patterns)
            for patterns in lists
            if patterns is not None
        )

    @cached_property
    def _allowed_ips(self) -> list[tuple[str, ...]]:
        return [limits.allowed_ips for limits in (self.tenant, self.key) if limits.allowed_ips is not None]

    def admits(self, address: str | None) -> bool:
        """Whether both allow this client address. An address that cannot be read passes no list."""
        if not self._allowed_ips:
            return True
        try:
            client = ip_address(address or "")
        except ValueError:
            return False
        client = getattr(client, "ipv4_mapped", None) or client
        return all(any(client in ip_network(text) for text in allowed) for allowed in self._allowed_ips)

    @cached_property
    def expires_at(self) -> float | None:
        return _least(self.tenant.expires_at, self.key.expires_at)

    @cached_property
    def max_tokens(self) -> int | None:
        cap = _least(self.tenant.max_tokens, self.key.max_tokens)
        return None if cap is None else int(cap)

    @cached_property
    def weight(self) -> float:
        """The tenant's share is the tenant's: a key can have less of it, not more."""
        return _least(self.tenant.weight or 1.0, self.key.weight) or 1.0

    @cached_property
    def priority(self) -> int:
        return (self.key.priority if self.key.priority is not None else self.tenant.priority) or 0

    @cached_property
    def shares_prefixes(self) -> bool:
        """A key can keep out of what its tenant shares."""
        return bool(self.tenant.shares_prefixes) and self.key.shares_prefixes is not False

    @cached_property
    def logs_prompts(self) -> bool:
        """What the key says, else what the tenant says: who manages a tenant's keys can opt in and out."""
        return bool(self.tenant.log_prompts if self.key.log_prompts is None else self.key.log_prompts)


NO_POLICY = Policy()


def _literal(pattern: str) -> str:
    """Only `*` is special."""
    return pattern.replace("[", "[[]").replace("?", "[?]")


def _least(one: float | None, other: float | None) -> float | None:
    return min((value for value in (one, other) if value is not None), default=None)
