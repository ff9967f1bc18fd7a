"""Secrets at rest, and the versions of the pepper."""

from __future__ import annotations

import pytest
from cryptography.fernet import Fernet

from loraplex.auth.errors import SecretUnreadable
from loraplex.auth.keys import digest
from loraplex.auth.peppers import Peppers
from loraplex.auth.vault import Vault


def test_secret_comes_back_and_is_not_in_what_is_stored() -> None:
    vault = Vault(b"pepper")
    stored = vault.encrypt("hf_a token é")
    assert "hf_" not in stored
    assert vault.encrypt("hf_a token é") != stored
    assert vault.decrypt(stored) == "hf_a token é"


@pytest.mark.parametrize("change", [lambda text: text[:-2] + "A=", lambda text: "", lambda text: "gAAA" + text])
def test_secret_changed_is_refused(change: object) -> None:
    stored = Vault(b"pepper").encrypt("secret")
    with pytest.raises(SecretUnreadable):
        Vault(b"pepper").decrypt(change(stored))  # type: ignore[operator]


def test_secret_under_an_older_pepper_is_read_and_renewed() -> None:
    stored = Vault(b"old").encrypt("secret")
    both = Vault(b"old\nnew\n")
    assert both.decrypt(stored) == "secret"
    renewed = both.renew(stored)
    assert Vault(b"new").decrypt(renewed) == "secret"
    for read in (Vault(b"new").decrypt, Vault(b"new").renew):
        with pytest.raises(SecretUnreadable):
            read(stored)


def test_secret_is_not_under_the_pepper_itself() -> None:
    key = Fernet.generate_key()
    with pytest.raises(SecretUnreadable):
        Vault(key).decrypt(Fernet(key).encrypt(b"x").decode())


def test_peppers_last_line_is_current() -> None:
    peppers = Peppers(b"one\n\n  two \n")
    assert peppers.digest("k") == digest(b"two", "k")
    assert peppers.digests("k") == [digest(b"two", "k"), digest(b"one", "k")]
    assert peppers.fingerprint == Peppers(b"two").fingerprint != Peppers(b"one").fingerprint


def test_peppers_none_is_refused() -> None:
    with pytest.raises(ValueError):
        Peppers(b" \n")
