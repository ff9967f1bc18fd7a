"""The form of keys, what is stored of them, and the pepper."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

from loraplex.auth.keys import digest, has_key_form, last_four, load_pepper, new_key


def test_new_key_has_the_documented_form() -> None:
    key = new_key("inference")
    assert re.fullmatch(r"sk-loraplex-[0-9A-Za-z]{8}-[0-9A-Za-z]{43}-[0-9A-Za-z]{6}", key)
    assert new_key("admin").startswith("ak-loraplex-")
    assert has_key_form(key)
    assert last_four(key) == key[-11:-7]
    assert len({new_key("inference") for _ in range(200)}) == 200


def test_has_key_form_any_changed_character_is_seen() -> None:
    key = new_key("inference")
    for at in range(len(key)):
        changed = key[:at] + ("x" if key[at] != "x" else "y") + key[at + 1 :]
        assert not has_key_form(changed), at


@pytest.mark.parametrize("text", ["", "sk-", "sk-loraplex--", "é" * 70, "sk-loraplex-" + "0" * 59, "\x00" * 70])
def test_has_key_form_other_text_is_none(text: str) -> None:
    assert not has_key_form(text)


def test_digest_depends_on_key_and_pepper() -> None:
    assert digest(b"a", "k") == digest(b"a", "k")
    assert len({digest(b"a", "k"), digest(b"b", "k"), digest(b"a", "l")}) == 3


def test_load_pepper_makes_a_private_file_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "pepper"
    pepper = load_pepper(None, path)
    assert len(pepper) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_pepper(None, path) == pepper
    assert load_pepper("given", path) == b"given"
