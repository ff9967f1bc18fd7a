"""The secrets outside the database that hashes of keys and stored secrets are made under, one version a line.

The last line is the current version: a new one is added below the others, and an old one may be taken out when no key
is under it any more. A version is known by a fingerprint, so that lines may go without renumbering.
"""

from __future__ import annotations

import hashlib
import hmac

from loraplex.auth.keys import digest


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
        return hmac.new(self._versions[0], b"loraplex pepper version", hashlib.sha256).hexdigest()[:8]

    def digest(self, key: str) -> str:
        """Under the current version."""
        return digest(self._versions[0], key)

    def digests(self, key: str) -> list[str]:
        """Under each version, the current one first."""
        return [digest(version, key) for version in self._versions]
