"""The form of keys, what is stored of them, and the pepper."""

from __future__ import annotations

import multiprocessing
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


def test_load_pepper_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pepper").write_text("\n")
    with pytest.raises(ValueError, match="pepper is empty"):
        load_pepper(None, tmp_path / "pepper")


def test_load_pepper_processes_that_start_together_agree(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for number in range(20):
            path = tmp_path / str(number) / "pepper"
            assert len(set(pool.starmap(load_pepper, [(None, path)] * 4, chunksize=1))) == 1
            assert [file.name for file in path.parent.iterdir()] == ["pepper"]


def test_has_key_form_any_other_alphabet_character_is_seen() -> None:
    """Every place of the key takes every other character that could stand there."""
    key = new_key("inference")
    alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-"
    for at, right in enumerate(key):
        for wrong in alphabet:
            assert wrong == right or not has_key_form(key[:at] + wrong + key[at + 1 :]), (at, wrong)


def test_has_key_form_swapped_neighbours_are_seen() -> None:
    key = new_key("inference")
    for at in range(len(key) - 1):
        swapped = key[:at] + key[at + 1] + key[at] + key[at + 2 :]
        assert swapped == key or not has_key_form(swapped), at


def test_new_key_draws_256_bits_of_the_systems_randomness(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def record(bits: int) -> int:
        drawn.append(bits)
        return (1 << bits) - 1

    monkeypatch.setattr("loraplex.auth.keys.secrets.randbits", record)
    assert has_key_form(new_key("inference"))  # the largest number fits its places
    assert max(drawn) == 256


def test_digest_is_hmac_sha_256() -> None:
    """RFC 4231, test case 2."""
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert digest(b"Jefe", "what do ya want for nothing?") == expected
