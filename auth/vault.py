"""Secrets that must be read again, such as hub tokens: encrypted where they are stored.

Fernet (AES-128-CBC with HMAC-SHA-256) under a key that HKDF derives from the pepper, which lies outside the database.
"""

from __future__ import annotations

import base64

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from loraplex.auth.errors import SecretUnreadable
from loraplex.auth.peppers import Peppers


class Vault:
    """Encrypts under the current pepper; what was encrypted under an older one that is still known can be read."""

    def __init__(self, pepper: bytes) -> None:
        self._fernet = MultiFernet([Fernet(_derive(version)) for version in Peppers(pepper).versions])

    def encrypt(self, secret: str) -> str:
        """ASCII text of about 4/3 the length plus 100 characters, different each time."""
        return self._fernet.encrypt(secret.encode()).decode("ascii")

    def decrypt(self, stored: str) -> str:
        """Raises SecretUnreadable for text that was changed, or encrypted under a pepper that is gone."""
        try:
            return self._fernet.decrypt(stored.encode()).decode()
        except InvalidToken as error:
            raise SecretUnreadable("A stored secret cannot be read: its pepper is gone, or it was changed.") from error

    def renew(self, stored: str) -> str:
        """The same secret under the current pepper. Raises SecretUnreadable."""
        try:
            return self._fernet.rotate(stored.encode()).decode("ascii")
        except InvalidToken as error:
            raise SecretUnreadable("A stored secret cannot be read: its pepper is gone, or it was changed.") from error


def _derive(pepper: bytes) -> bytes:
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"loraplex secrets at rest").derive(pepper)
    return base64.urlsafe_b64encode(key)
