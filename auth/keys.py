"""The form of an API key, and what of it is stored.

    sk-loraplex-<8 characters: public id>-<43: 256 random bits>-<6: checksum>        (ak-loraplex-… for admins)

A checksum lets a mistyped key be refused without a look-up and secret scanners recognise one. Only an HMAC under a
pepper that lies outside the database is stored: whoever reads the database can neither use nor guess a key.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import re
import secrets
import tempfile
import zlib
from pathlib import Path

from loraplex.auth.caller import Role

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ADMIN_PREFIX = "ak-loraplex"
_PREFIXES: dict[Role, str] = {"inference": "sk-loraplex", "tenant-admin": "sk-loraplex", "admin": ADMIN_PREFIX}
_FORM = re.compile(r"(?P<signed>(sk|ak)-loraplex-[0-9A-Za-z]{8}-[0-9A-Za-z]{43})-(?P<checksum>[0-9A-Za-z]{6})")


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


def _checksum(text: str) -> str:
    return _base62(zlib.crc32(text.encode()), 6)


def new_key(role: Role) -> str:
    """A fresh key; the caller shows it once and keeps only `digest` and `last_four`."""
    signed = f"{_PREFIXES[role]}-{_base62(secrets.randbits(47), 8)}-{_base62(secrets.randbits(256), 43)}"
    return f"{signed}-{_checksum(signed)}"


def has_key_form(key: str) -> bool:
    """Whether the text is a key at all: prefix, lengths, checksum."""
    match = _FORM.fullmatch(key)
    return match is not None and hmac.compare_digest(_checksum(match["signed"]), match["checksum"])


def last_four(key: str) -> str:
    """The last characters of the secret part (what follows is a checksum of everything)."""
    return key.rpartition("-")[0][-4:]


def digest(pepper: bytes, key: str) -> str:
    """HMAC-SHA-256 of the key, in hex."""
    return hmac.digest(pepper, key.encode(), "sha256").hex()


def load_pepper(value: str | None, path: Path) -> bytes:
    """The pepper from `value` if given, else from the file, which is made on first use (mode 0600).

    Raises OSError, or ValueError where the file is empty.
    """
    if value is not None:
        return value.encode()
    path = path.expanduser()
    if not path.exists():
        _make_pepper(path)
    pepper = path.read_bytes().strip()
    if not pepper:
        raise ValueError(f"{path} is empty; it must hold the secret that key hashes are made under")
    return pepper


def _make_pepper(path: Path) -> None:
    """Whole or not at all, so that a process beside this one never reads half a secret; the first to come wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # of mode 0600
    try:
        with open(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)
