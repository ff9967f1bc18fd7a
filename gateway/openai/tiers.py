"""OpenAI's service tiers, as far as keys allow: which of a tenant's own requests go first."""

from typing import Literal, TypeAlias

from msgspec.structs import replace

from loraplex.auth.caller import Caller
from loraplex.engines.protocol import GenerateRequest
from loraplex.gateway.errors import UnsupportedParameter

GrantedTier: TypeAlias = Literal["default", "flex", "priority"]


def granted_tier(asked: str | None, caller: Caller) -> GrantedTier:
    """`flex` waits for the key's other requests; `priority` is for keys that have one. Raises UnsupportedParameter."""
    has_priority = caller.policy.priority > 0
    if asked == "priority" and not has_priority:
        raise UnsupportedParameter("This key has no priority.", "service_tier")
    if asked == "flex":
        return "flex"
    return "priority" if has_priority and asked in ("auto", "priority") else "default"


def at_tier(tier: GrantedTier, choices: list[GenerateRequest]) -> list[GenerateRequest]:
    """The same requests, one step behind the key's others where the tier is `flex`."""
    return [replace(choice, priority=choice.priority - 1) for choice in choices] if tier == "flex" else choices
