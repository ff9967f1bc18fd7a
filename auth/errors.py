"""What can be wrong with a caller or with what it asks of tenants and keys."""

from __future__ import annotations


class AuthError(Exception):
    """Base of everything auth raises on purpose; `str(error)` is fit for the client and never holds a key."""


class InvalidApiKey(AuthError):
    """No key, a mistyped one, or one that is unknown, revoked or expired: the caller learns no more than that."""


class NotAllowed(AuthError):
    """The key is good, but its role does not reach this far."""


class TenantNotFound(AuthError):
    """There is no such tenant."""


class KeyNotFound(AuthError):
    """There is no such key in this tenant."""


class NameTaken(AuthError):
    """Something else has this name already."""
