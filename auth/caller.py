"""Who is calling: what a good API key says about its bearer."""

from __future__ import annotations

from typing import Literal

import msgspec

Role = Literal["admin", "inference"]


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """One authenticated caller. An admin belongs to no tenant: its `tenant_id` is empty."""

    tenant_id: str
    tenant_name: str
    key_id: str
    role: Role
