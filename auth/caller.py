"""Who is calling: what a good API key says about its bearer."""

from __future__ import annotations

from typing import Literal

import msgspec

from loraplex.auth.limits.policy import NO_POLICY, Policy

# An admin runs the server; a tenant-admin manages the keys of one tenant, and may infer; an inference key infers.
Role = Literal["admin", "tenant-admin", "inference"]
KeyRole = Literal["tenant-admin", "inference"]


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """One authenticated caller. An admin belongs to no tenant: its `tenant_id` is empty.

    `as_of` is the number of changes known when the key was looked up (`Tenants.num_changes`).
    What it asks for `is_background` where nobody waits for the answer.
    """

    tenant_id: str
    tenant_name: str
    key_id: str
    role: Role
    policy: Policy = NO_POLICY
    as_of: int = 0
    is_background: bool = False
