"""Addresses and directories made to harm: each is refused with words that say why, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.adapter_files import CONFIG, CONFIG_NAME, WEIGHTS_NAME, adapter_files, weights, write_files
from support.hostile_adapters import ARCHIVES, BOMBS, CONFIGS, FILES, HEADERS, MAX_BYTES, SPECIAL, URIS

from loraplex.config.settings import Adapters
from loraplex.engines.adapters.config import read_config
from loraplex.engines.adapters.disk import DiskCache
from loraplex.engines.adapters.sources.archive import unpack
from loraplex.engines.adapters.sources.base import Transfer, Workspace
from loraplex.engines.adapters.sources.registry import Sources
from loraplex.engines.adapters.store import AdapterStore
from loraplex.engines.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterNotFound,
    AdapterSourceForbidden,
)


def left_behind(tmp_path: Path) -> list[Path]:
    cache = tmp_path / "cache"
    return [path for part in ("objects", "staging", "refs") for path in (cache / part).iterdir()]


@pytest.mark.parametrize("uri", URIS, ids=lambda uri: ascii(uri)[:40])
async def test_fetch_hostile_uri_is_refused(store: AdapterStore, tmp_path: Path, uri: str) -> None:
    kind, message = URIS[uri]
    with pytest.raises(AdapterError, match=message) as caught:
        await store.fetch(uri, "n")
    assert type(caught.value) is kind
    assert "secret@" not in str(caught.value)
    assert "token@" not in str(caught.value)
    assert left_behind(tmp_path) == []


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    settings = Adapters(cache_dir=str(tmp_path / "cache"), local_roots=(str(tmp_path),))
    return Sources(settings, DiskCache(tmp_path / "uploads", 2**20, for_good=True))


_SCHEMES = ["", "hf://", "s3://", "https://", "file://", "file:", "upload://", "HF:", "hf:/", "https:/"]
_PARTS = st.text(alphabet="aZ0-_./@:?#%[]\\\u00e9 \n", max_size=30)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(uri=st.builds("{}{}".format, st.sampled_from(_SCHEMES), _PARTS) | st.text(max_size=40))
def test_any_address_is_normal_or_refused(sources: Sources, uri: str) -> None:
    """What is normal means itself, and what is shown of it is one line without a query."""
    told = ""
    try:
        _, address = sources.find(uri)
        told = address.shown
        assert "?" not in told or told.startswith("file://")
        if not told.startswith("file://"):
            assert sources.find(address.uri)[1] == address
    except AdapterError as error:
        told = str(error)
    assert len(told) < 600
    assert told.isprintable()


@pytest.mark.parametrize("case", FILES)
async def test_fetch_hostile_files_are_refused(store: AdapterStore, root: Path, tmp_path: Path, case: str) -> None:
    files, kind, message = FILES[case]
    with pytest.raises(AdapterError, match=message) as caught:
        await store.fetch(str(write_files(root / "bad", files)), "n")
    assert type(caught.value) is kind
    assert f"file://{root / 'bad'}: " in str(caught.value)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("case", SPECIAL)
async def test_fetch_special_file_is_refused(store: AdapterStore, root: Path, tmp_path: Path, case: str) -> None:
    make, kind, message = SPECIAL[case]
    (tmp_path / "outside").write_bytes(weights())
    make(write_files(root / "bad", adapter_files()))
    with pytest.raises(AdapterError, match=message) as caught:
        await store.fetch(str(root / "bad"), "n")
    assert type(caught.value) is kind
    assert left_behind(tmp_path) == []


async def test_fetch_directory_that_is_a_link_out_is_forbidden(store: AdapterStore, root: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "outside", adapter_files())
    (root / "link").symlink_to(tmp_path / "outside")
    for uri in (root / "link", root / ".." / "outside", root / "link" / ".." / "outside"):
        with pytest.raises(AdapterSourceForbidden, match="local_roots"):
            await store.fetch(str(uri), "n")


async def test_fetch_circle_of_links_is_not_found(store: AdapterStore, root: Path) -> None:
    (root / "a").symlink_to(root / "b")
    (root / "b").symlink_to(root / "a")
    with pytest.raises(AdapterNotFound, match="leads nowhere"):
        await store.fetch(str(root / "a"), "n")


async def test_fetch_missing_directory_or_file_is_not_found(store: AdapterStore, root: Path) -> None:
    (root / "file").write_bytes(b"x")
    with pytest.raises(AdapterNotFound, match="no such directory"):
        await store.fetch(str(root / "none"), "n")
    with pytest.raises(AdapterNotFound, match="not a directory"):
        await store.fetch(str(root / "file"), "n")


async def test_fetch_local_with_a_token_is_invalid(store: AdapterStore, root: Path) -> None:
    with pytest.raises(AdapterInvalid, match="takes no token"):
        await store.fetch(str(write_files(root / "a", adapter_files())), "n", token="secret")


@pytest.mark.parametrize("token", ["", "a b", "a\nX-Injected: 1", "\u00e4", "\ud800", "a" * 8193], ids=ascii)
@pytest.mark.parametrize("uri", ["hf://org/name", "s3://bucket/a", "https://host/a.zip"])
async def test_fetch_token_that_is_none_is_invalid(store: AdapterStore, uri: str, token: str) -> None:
    with pytest.raises(AdapterInvalid, match="a token is 1 to 8192 printable ASCII characters") as caught:
        await store.fetch(uri, "n", token=token)
    assert not token or token not in str(caught.value)


async def test_hostile_cases_are_many_and_each_error_says_what_was_wrong(
    store: AdapterStore, root: Path, tmp_path: Path
) -> None:
    """All tables together: how many there are, and that few share their words with another."""
    errors: dict[str, str] = {}

    async def fetch(case: str, uri: str) -> None:
        with pytest.raises(AdapterError) as caught:
            await store.fetch(uri, "n")
        errors[case] = str(caught.value).removeprefix(f"file://{uri}: ")

    for uri in URIS:
        await fetch(f"the address {uri!r}", uri)
    headers = {name: adapter_files() | {WEIGHTS_NAME: content} for name, (content, _) in HEADERS.items()}
    for case, files in (headers | {name: files for name, (files, _, _) in FILES.items()}).items():
        await fetch(case, str(write_files(root / f"bad-{len(errors)}", files)))
    for case, (content, _) in ARCHIVES.items() | {(name, (content, "")) for name, content in BOMBS.items()}:
        errors[f"the archive {case}"] = str(refused(unpack_into, tmp_path / f"archive-{len(errors)}", content))
    for fields, _, _ in CONFIGS:
        errors[f"the config {fields}"] = str(refused(read_config_of, tmp_path / f"config-{len(errors)}", fields))
    assert len(errors) >= 150
    assert len(set(errors.values())) >= 100
    assert all(15 < len(told) < 600 and told.isprintable() for told in errors.values())
    assert left_behind(tmp_path) == []


def refused(read: Callable[[Path, Any], object], place: Path, content: Any) -> AdapterError:
    place.mkdir()
    with pytest.raises(AdapterError) as caught:
        read(place, content)
    return caught.value


def unpack_into(place: Path, content: bytes) -> None:
    (place / "files").mkdir()
    (place / "archive").write_bytes(content)
    unpack(place / "archive", Workspace(files=place / "files", scratch=place), Transfer(MAX_BYTES))


def read_config_of(place: Path, fields: dict[str, Any]) -> object:
    (place / CONFIG_NAME).write_text(json.dumps(CONFIG | fields))
    return read_config(place)
