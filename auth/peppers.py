"""The secrets outside the database that hashes of keys and stored secrets are made under, one version a line.

The last line is the current version: a new one is added below the others, and an old one may be taken out when no key
is under it any more. A version is known by a fingerprint, so that lines may go without renumbering.
"""

from __future__ import annotations

import hashlib
import hmac

from sqlalchemy import func, select, union
from sqlalchemy.ext.asyncio import AsyncEngine

from loraplex.auth.keys import digest
from loraplex.auth.store.tables import api_keys, tenant_secrets


class Peppers:
    """Every version of the pepper. Raises ValueError where there is none."""

    def __init__(self, lines: bytes) -> None:
        self._versions = [line.strip() for line in reversed(lines.splitlines()) if line.strip()]
        if not self._versions:
            raise ValueError("there is no pepper")

    @property
    def versions(self) -> list[bytes]:
        """The current one first."""
        return list(self._versions)

    @property
    def fingerprint(self) -> str:
        """Of the current version, 8 hex digits; it says nothing of the secret."""
        return _fingerprint(self._versions[0])

    @property
    def fingerprints(self) -> set[str]:
        """Of every version."""
        return {_fingerprint(version) for version in self._versions}

    def digest(self, key: str) -> str:
        """Under the current version."""
        return digest(self._versions[0], key)

    def digests(self, key: str) -> list[str]:
        """Under each version, the current one first."""
        return [digest(version, key) for version in self._versions]


async def fingerprints_in(database: AsyncEngine, now: float) -> set[str]:
    """Of the peppers that a database's living keys and its secrets are under, as far as it says."""
    is_over = api_keys.c.revoked_at.is_not(None) | (func.coalesce(api_keys.c.expires_at, now + 1) <= now)
    query = union(select(api_keys.c.pepper).where(~is_over), select(tenant_secrets.c.pepper))
    async with database.connect() as connection:
        return set((await connection.execute(query)).scalars()) - {""}


def _fingerprint(version: bytes) -> str:
    return hmac.new(version, b"loraplex pepper version", hashlib.sha256).hexdigest()[:8]
