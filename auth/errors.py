"""What can be wrong with a caller or with what it asks of tenants and keys."""

from __future__ import annotations


class AuthError(Exception):
    """Base of everything auth raises on purpose; `str(error)` is fit for the client and never holds a key."""


class InvalidApiKey(AuthError):
    """No key, a mistyped one, or one that is unknown, revoked or expired: the caller learns no more than that."""


class KeysUnavailable(AuthError):
    """The database does not say at the moment whose key this is."""


class NotAllowed(AuthError):
    """The key is good, but its role does not reach this far."""


class AddressNotAllowed(AuthError):
    """The key is good, but not from this client's address."""


class TenantNotFound(AuthError):
    """There is no such tenant."""


class KeyNotFound(AuthError):
    """There is no such key in this tenant."""


class NameTaken(AuthError):
    """Something else has this name already."""


class SecretNotFound(AuthError):
    """The tenant has no secret of this name."""


class LastAdminKey(AuthError):
    """Without this key nobody could manage the server any more."""


class SecretUnreadable(AuthError):
    """A secret in the database cannot be decrypted under any known pepper."""


class LimitReached(AuthError):
    """A limit leaves no room for the request. `retry_after` in seconds; another try is useless where `is_final`."""

    def __init__(self, message: str, retry_after: float | None, *, is_final: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.is_final = is_final


class RequestsLimited(LimitReached):
    """Too many requests per minute or at the same time."""


class TokensLimited(LimitReached):
    """Too many tokens per minute."""


class QuotaSpent(LimitReached):
    """The token budget of the day or the month is spent, or, where that is not final, reserved by running requests."""


class LimitsUnavailable(AuthError):
    """The store that gateways share limits through does not answer."""


class UsageUnrecorded(AuthError):
    """What requests use cannot be written down at the moment, so that no request is taken on."""
