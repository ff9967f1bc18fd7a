"""Addresses and directories made to harm: each is refused with words that say why, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from support.adapter_files import CONFIG, CONFIG_NAME, WEIGHTS_NAME, adapter_files, weights, write_files

from loraplex.engines.adapters.store import AdapterStore
from loraplex.engines.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterNotFound,
    AdapterSourceForbidden,
    AdapterTooLarge,
    AdapterUnsupported,
)

URIS: dict[str, tuple[type[AdapterError], str]] = {
    "": (AdapterInvalid, "1 to 4096 characters"),
    "a" * 5000: (AdapterInvalid, "1 to 4096 characters"),
    "hf://org/na\nme": (AdapterInvalid, "control characters"),
    "/etc\0/passwd": (AdapterInvalid, "control characters"),
    "org/\ud800": (AdapterInvalid, "broken Unicode"),
    "ftp://host/a": (AdapterSourceForbidden, "ftp: is not served"),
    "http://127.0.0.1/a.zip": (AdapterSourceForbidden, "http: is not served"),
    "gs://bucket/a": (AdapterSourceForbidden, "gs: is not served"),
    "javascript:alert(1)": (AdapterSourceForbidden, "javascript: is not served"),
    "hf://": (AdapterInvalid, "not an address on the hub"),
    "hf://name": (AdapterInvalid, "not an address on the hub"),
    "hf://a/b/c": (AdapterInvalid, "not an address on the hub"),
    "hf://../..": (AdapterInvalid, "not an address on the hub"),
    "hf://org/..": (AdapterInvalid, "not an address on the hub"),
    "hf://org/a..b": (AdapterInvalid, "not an address on the hub"),
    "hf://org/name@": (AdapterInvalid, "not an address on the hub"),
    "hf://org/name@../../secret": (AdapterInvalid, "not an address on the hub"),
    "hf://org/name@a b": (AdapterInvalid, "not an address on the hub"),
    "hf://org/name?x=1": (AdapterInvalid, "not an address on the hub"),
    "hf://user:token@org/name": (AdapterInvalid, "not an address on the hub"),
    "s3://": (AdapterInvalid, "not an address in S3"),
    "s3://UPPER/a": (AdapterInvalid, "not an address in S3"),
    "s3://a/b": (AdapterInvalid, "not an address in S3"),
    "s3://key:secret@bucket/a": (AdapterInvalid, "not an address in S3"),
    "s3://bucket/../other": (AdapterInvalid, "segment"),
    "s3://bucket/a//b": (AdapterInvalid, "segment"),
    "https://": (AdapterInvalid, "not an https address"),
    "https://host:port/a": (AdapterInvalid, "not an https address"),
    "https://user:secret@host/a": (AdapterInvalid, "no user or password"),
    "https://host/a b": (AdapterInvalid, "not an https address"),
    "https://[::1": (AdapterInvalid, "not an https address"),
    "https://localhost/a.zip": (AdapterSourceForbidden, "not a public address"),
    "https://127.0.0.1/a.zip": (AdapterSourceForbidden, "not a public address"),
    "https://[::1]/a.zip": (AdapterSourceForbidden, "not a public address"),
    "https://169.254.169.254/latest/meta-data": (AdapterSourceForbidden, "not a public address"),
    "https://2130706433/a.zip": (AdapterSourceForbidden, "not a public address"),
    "https://[::ffff:10.0.0.1]/a.zip": (AdapterSourceForbidden, "not a public address"),
    "file://otherhost/etc": (AdapterInvalid, "not a local file address"),
    "file:relative": (AdapterInvalid, "not a local file address"),
    "file:///etc?x": (AdapterInvalid, "not a local file address"),
    "file:///%00": (AdapterInvalid, "NUL byte"),
    "file:///etc": (AdapterSourceForbidden, "local_roots"),
    "/etc": (AdapterSourceForbidden, "local_roots"),
    "/": (AdapterSourceForbidden, "local_roots"),
    "../../../etc": (AdapterSourceForbidden, "local_roots"),
    "~root": (AdapterSourceForbidden, "local_roots"),
    "file:///%2e%2e/etc": (AdapterSourceForbidden, "local_roots"),
    "/proc/self/root/etc": (AdapterSourceForbidden, "local_roots"),
    f"/{'a' * 300}": (AdapterSourceForbidden, "local_roots"),
}


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


def configured(config: object) -> dict[str, bytes]:
    content = config if isinstance(config, bytes) else json.dumps(config).encode()
    return adapter_files() | {CONFIG_NAME: content}


def weighted(content: bytes) -> dict[str, bytes]:
    return adapter_files() | {WEIGHTS_NAME: content}


def only(*names: str) -> dict[str, bytes]:
    return {name: adapter_files().get(name, b"x") for name in names}


FILES: dict[str, tuple[dict[str, bytes], type[AdapterError], str]] = {
    "nothing": ({}, AdapterInvalid, "no adapter_config.json"),
    "no config": (only(WEIGHTS_NAME), AdapterInvalid, "no adapter_config.json"),
    "no weights": (only(CONFIG_NAME), AdapterInvalid, "no adapter_model.safetensors"),
    "a pickle": (only(CONFIG_NAME, "adapter_model.bin"), AdapterInvalid, "pickle.*never read.*convert"),
    "a .pt": (only(CONFIG_NAME, "adapter.pt"), AdapterInvalid, r"pickle \(adapter.pt\)"),
    "a .pkl": (only(CONFIG_NAME, "adapter.pkl"), AdapterInvalid, r"pickle \(adapter.pkl\)"),
    "an empty config": (configured(b""), AdapterInvalid, "not valid JSON"),
    "a config in Latin-1": (configured(b'{"peft_type": "LORA", "x": "\xe4"}'), AdapterInvalid, "not valid JSON"),
    "a config of brackets": (configured(b"[" * 100_000), AdapterInvalid, "not valid JSON"),
    "a config that is a list": (configured([]), AdapterInvalid, "not a JSON object"),
    "a config that is null": (configured(None), AdapterInvalid, "not a JSON object"),
    "a config without type": (configured({"r": 4}), AdapterInvalid, "no peft_type"),
    "a prefix tuning": (configured({"peft_type": "PREFIX_TUNING"}), AdapterUnsupported, "PREFIX_TUNING"),
    "a type that is a list": (configured({"peft_type": ["LORA"]}), AdapterUnsupported, "only LORA"),
    "a config over 1 MiB": (configured(CONFIG | {"x": "a" * 2**20}), AdapterTooLarge, "adapter_config.json has"),
    "a tokenizer config over 4 MiB": (
        adapter_files() | {"tokenizer_config.json": bytes(2**22 + 1)},
        AdapterTooLarge,
        "tokenizer_config.json has",
    ),
    "weights over the limit": (weighted(weights(size=2**16)), AdapterTooLarge, "adapters.max_bytes"),
    "empty weights": (weighted(b""), AdapterInvalid, "too few"),
    "weights that are a pickle": (weighted(b"\x80\x04\x95" + bytes(60)), AdapterInvalid, "safetensors header"),
    "weights that are a zip": (weighted(b"PK\3\4" + bytes(60)), AdapterInvalid, "safetensors header"),
    "weights cut short": (weighted(weights()[:-1]), AdapterInvalid, "behind the file"),
    "weights with a tail": (weighted(weights() + b"x"), AdapterInvalid, "belong to no tensor"),
    "a header beyond the file": (weighted(struct.pack("<Q", 10**6) + b"{"), AdapterInvalid, "only 1 follow"),
    "a header of 2**63": (weighted(struct.pack("<Q", 2**63) + b"{"), AdapterInvalid, "at most"),
    "an LFS pointer": (
        weighted(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        AdapterInvalid,
        "safetensors header",
    ),
}


@pytest.mark.parametrize("case", FILES)
async def test_fetch_hostile_files_are_refused(store: AdapterStore, root: Path, tmp_path: Path, case: str) -> None:
    files, kind, message = FILES[case]
    with pytest.raises(AdapterError, match=message) as caught:
        await store.fetch(str(write_files(root / "bad", files)), "n")
    assert type(caught.value) is kind
    assert f"file://{root / 'bad'}: " in str(caught.value)
    assert left_behind(tmp_path) == []


def link_weights(target: str | Path) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        (directory / WEIGHTS_NAME).unlink()
        (directory / WEIGHTS_NAME).symlink_to(target)

    return make


def fifo(directory: Path) -> None:
    (directory / WEIGHTS_NAME).unlink()
    os.mkfifo(directory / WEIGHTS_NAME)


def directory_as_weights(directory: Path) -> None:
    (directory / WEIGHTS_NAME).unlink()
    (directory / WEIGHTS_NAME).mkdir()


def bound_socket(directory: Path) -> None:
    (directory / WEIGHTS_NAME).unlink()
    before = os.getcwd()
    os.chdir(directory)  # a socket's name is at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(WEIGHTS_NAME)
    finally:
        os.chdir(before)


SPECIAL: dict[str, tuple[Callable[[Path], None], type[AdapterError], str]] = {
    "a link out": (link_weights("/etc/passwd"), AdapterSourceForbidden, "link out of"),
    "a link up and out": (link_weights("../../outside"), AdapterSourceForbidden, "link out of"),
    "a link to nothing": (link_weights("nowhere"), AdapterNotFound, "leads nowhere"),
    "a link to itself": (link_weights(WEIGHTS_NAME), AdapterNotFound, "leads nowhere"),
    "a link to a device": (link_weights("/dev/zero"), AdapterSourceForbidden, "link out of"),
    "a pipe": (fifo, AdapterSourceForbidden, "not a regular file"),
    "a socket": (bound_socket, AdapterNotFound, "cannot be opened"),
    "a directory": (directory_as_weights, AdapterSourceForbidden, "not a regular file"),
}


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
