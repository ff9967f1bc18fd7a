"""Addresses, files, headers, archives and configs made to harm, and what the error has to say of each."""

from __future__ import annotations

import gzip
import json
import os
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save
from support.adapter_files import CONFIG, CONFIG_NAME, WEIGHTS_NAME, adapter_files, weights
from support.archives import member, tar_gz, zipped

from loraplex.engines.adapters.safetensors_header import MAX_HEADER_BYTES
from loraplex.engines.adapters.sources.archive import MAX_ENTRIES
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


def with_header(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def tensor(begin: int = 0, end: int = 8, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "too few"),
    "seven bytes": (b"1234567", "too few"),
    "length beyond the file": (struct.pack("<Q", 100) + b"{}", "only 2 follow"),
    "length beyond the limit": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "at most"),
    "length of 2**64 - 1": (struct.pack("<Q", 2**64 - 1) + b"{}", "at most"),
    "an empty header": (with_header(b""), "begin with"),
    "a list": (with_header([]), "begin with"),
    "leading space": (with_header(b" {}"), "begin with"),
    "half an object": (with_header(b'{"a": '), "not valid JSON"),
    "two objects": (with_header(b"{}{}"), "not valid JSON"),
    "not UTF-8": (with_header(b'{"\xff": 1}'), "not valid JSON"),
    "deep nesting": (with_header(b'{"a":' + b"[" * 200_000), "not valid JSON"),
    "NaN": (with_header(b'{"a": NaN}'), "not valid JSON"),
    "a number of 5000 digits": (with_header(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "a name twice": (with_header(b'{"a": 1, "a": 1}'), "'a' twice"),
    "a key twice": (with_header(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' twice"),
    "a surrogate name": (with_header(b'{"\\ud800": {}}'), "not Unicode"),
    "metadata a list": (with_header({"__metadata__": []}), "__metadata__"),
    "metadata of numbers": (with_header({"__metadata__": {"a": 1}}), "__metadata__"),
    "a number for a tensor": (with_header({"a": 1}), "not described"),
    "a tensor without dtype": (with_header({"a": {"shape": [], "data_offsets": [0, 0]}}), "not described"),
    "a surplus key": (with_header({"a": tensor() | {"b": 1}}, bytes(8)), "not described"),
    "an unknown dtype": (with_header({"a": tensor(dtype="F33")}, bytes(8)), "dtype 'F33'"),
    "a dtype that is a list": (with_header({"a": tensor(dtype=["F32"])}, bytes(8)), "unknown dtype"),
    "a negative dimension": (with_header({"a": tensor(shape=[-1, -2])}, bytes(8)), "impossible shape"),
    "a fractional dimension": (with_header({"a": tensor(shape=[2.0])}, bytes(8)), "impossible shape"),
    "a boolean dimension": (with_header({"a": tensor(0, 4, shape=[True])}, bytes(4)), "impossible shape"),
    "a dimension of 2**63": (with_header({"a": tensor(shape=[2**63])}, bytes(8)), "impossible shape"),
    "a shape that overflows": (with_header({"a": tensor(shape=[2**62] * 64)}, bytes(8)), "bits"),
    "65 dimensions": (with_header({"a": tensor(0, 4, shape=[1] * 65)}, bytes(4)), "impossible shape"),
    "a shape that is a string": (with_header({"a": tensor(shape="22")}, bytes(8)), "impossible shape"),
    "three offsets": (with_header({"a": tensor() | {"data_offsets": [0, 4, 8]}}, bytes(8)), "data_offsets"),
    "offsets backwards": (with_header({"a": tensor(8, 0)}, bytes(8)), "data_offsets"),
    "negative offsets": (with_header({"a": tensor(-8, 0)}, bytes(8)), "data_offsets"),
    "a span too short": (with_header({"a": tensor(0, 4)}, bytes(4)), "span 4 bytes"),
    "half a byte": (with_header({"a": tensor(0, 1, dtype="F4", shape=[1])}, bytes(1)), "4 bits"),
    "an end behind the file": (with_header({"a": tensor()}, bytes(7)), "1 bytes behind the file"),
    "a surplus byte": (with_header({"a": tensor()}, bytes(9)), "last 1 bytes"),
    "bytes without tensors": (with_header({}, bytes(3)), "last 3 bytes"),
    "a hole": (with_header({"a": tensor(), "b": tensor(12, 20)}, bytes(20)), "4 bytes before tensor 'b'"),
    "an overlap": (with_header({"a": tensor(), "b": tensor(4, 12)}, bytes(12)), "overlaps"),
    "the same bytes twice": (with_header({"a": tensor(), "b": tensor()}, bytes(8)), "overlaps"),
}


def configured(config: object) -> dict[str, bytes]:
    content = config if isinstance(config, bytes) else json.dumps(config).encode()
    return adapter_files() | {CONFIG_NAME: content}


def weighted(content: bytes) -> dict[str, bytes]:
    return adapter_files() | {WEIGHTS_NAME: content}


def spoilt(value: float, dtype: npt.DTypeLike) -> bytes:
    """Weights of which one number is this one."""
    tensors = {"a": np.ones((2, 3), dtype), "b": np.ones((2, 3), dtype)}
    tensors["b"][1, 2] = value
    return save(tensors)


def only(*names: str) -> dict[str, bytes]:
    return {name: adapter_files().get(name, b"x") for name in names}


FILES: dict[str, tuple[dict[str, bytes], type[AdapterError], str]] = {
    "nothing": ({}, AdapterInvalid, "no adapter_config.json"),
    "no config": (only(WEIGHTS_NAME), AdapterInvalid, "no adapter_config.json"),
    "no weights": (only(CONFIG_NAME), AdapterInvalid, "no adapter_model.safetensors"),
    "a pickle": (only(CONFIG_NAME, "adapter_model.bin"), AdapterInvalid, "pickle.*never read.*convert"),
    "shards": (
        only(CONFIG_NAME, "adapter_model-00001-of-00002.safetensors", "adapter_model.safetensors.index.json"),
        AdapterUnsupported,
        r"several files \(adapter_model-00001-of-00002.safetensors\); save them in one.*max_shard_size",
    ),
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
    "weights with a NaN": (weighted(spoilt(np.nan, np.float32)), AdapterInvalid, r"tensor 'b' has a NaN.* at \[1, 2\]"),
    "half weights with an infinity": (
        weighted(spoilt(-np.inf, np.float16)),
        AdapterInvalid,
        "tensor 'b' has a NaN or an",
    ),
    "an LFS pointer": (
        weighted(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        AdapterInvalid,
        "safetensors header",
    ),
}


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


MEMBERS = list(adapter_files().items())
MAX_BYTES = 2**20


def below(directory: str) -> list[tuple[str, bytes]]:
    return [(directory + name, content) for name, content in MEMBERS]


def pax_bomb() -> bytes:
    """A header that asks its reader to load 512 MiB of zeros at once, in half a megabyte."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 2**29
    return gzip.compress(info.tobuf(tarfile.USTAR_FORMAT)) + gzip.compress(bytes(2**20)) * 2**9


def zip_with_lying_size(num_bytes: int) -> bytes:
    """A zip whose directory says how many bytes the weights have, whatever they have."""
    content = bytearray(zipped(MEMBERS))
    name = WEIGHTS_NAME.encode()
    header = content.rindex(name) - 46
    content[header + 24 : header + 28] = struct.pack("<I", num_bytes)
    return bytes(content)


def encrypted() -> bytes:
    content = bytearray(zipped(MEMBERS))
    header = content.index(b"PK\1\2")
    content[header + 8] |= 1
    return bytes(content)


def many(number: int) -> list[tuple[str, bytes]]:
    return [(f"f{index}", b"") for index in range(number)]


ARCHIVES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "neither"),
    "plain text": (b"hello", "neither"),
    "a plain tar": (gzip.decompress(tar_gz(MEMBERS)), "neither"),
    "gzip of nothing": (gzip.compress(b""), "damaged|no adapter_config"),
    "gzip of text": (gzip.compress(b"hello" * 500), "damaged"),
    "a tar cut short": (tar_gz(MEMBERS)[:-200], "damaged"),
    "a zip cut short": (zipped(MEMBERS)[:-30], "damaged"),
    "an empty tar": (tar_gz([]), "no adapter_config"),
    "an empty zip": (zipped([]), "no adapter_config"),
    "a tar with an absolute name": (tar_gz([*MEMBERS, ("/etc/passwd", b"x")]), "points out of it"),
    "a tar with dots": (tar_gz([*MEMBERS, ("../../x", b"x")]), "points out of it"),
    "a tar with dots inside": (tar_gz([*MEMBERS, ("a/../../x", b"x")]), "points out of it"),
    "a zip with an absolute name": (zipped([*MEMBERS, ("/etc/passwd", b"x")]), "points out of it"),
    "a zip with dots": (zipped([*MEMBERS, ("../x", b"x")]), "points out of it"),
    "a zip with a backslash": (zipped([*MEMBERS, ("..\\x", b"x")]), "impossible name"),
    "a name with a newline": (zipped([*MEMBERS, ("a\nb", b"x")]), "impossible name"),
    "a name of 2000 letters": (tar_gz([*MEMBERS, ("a" * 2000, b"x")]), "impossible name"),
    "a symbolic link": (tar_gz(MEMBERS, member("x", tarfile.SYMTYPE, "/etc/passwd")), "a link"),
    "a hard link": (tar_gz(MEMBERS, member("x", tarfile.LNKTYPE, CONFIG_NAME)), "a link"),
    "a config that is a link": (tar_gz([], member(CONFIG_NAME, tarfile.SYMTYPE, "/etc/passwd")), "a link"),
    "a device": (tar_gz(MEMBERS, member("x", tarfile.CHRTYPE)), "not a plain file"),
    "a pipe": (tar_gz(MEMBERS, member("x", tarfile.FIFOTYPE)), "not a plain file"),
    "a link in a zip": (zipped(MEMBERS, mode=0o120777), "a link"),
    "a device in a zip": (zipped(MEMBERS, mode=0o020666), "not a plain file"),
    "two adapters": (tar_gz([*below("a/"), *below("b/")]), "several adapters, in a and b"),
    "a file twice": (tar_gz([*MEMBERS, MEMBERS[0]]), "twice"),
    "a file twice in a zip": (zipped([*MEMBERS, MEMBERS[0]]), "twice"),
    "too many entries": (tar_gz([*MEMBERS, *many(MAX_ENTRIES)]), "more than 1000 entries"),
    "too many entries in a zip": (zipped([*MEMBERS, *many(MAX_ENTRIES)]), "more than 1000 entries"),
    "a zip directory of a megabyte": (zipped([(f"{'n' * 900}{i}", b"") for i in range(1300)]), "exceeds 1048576"),
    "a zip without directory": (b"PK\3\4" + bytes(100), "damaged"),
    "LZMA": (zipped(MEMBERS, method=zipfile.ZIP_LZMA), "another method"),
    "bzip2": (zipped(MEMBERS, method=zipfile.ZIP_BZIP2), "another method"),
    "an encrypted zip": (encrypted(), "encrypted"),
    "a zip that promises more": (zip_with_lying_size(5000), "damaged|shorter"),
    "a zip that promises less": (zip_with_lying_size(5), "damaged|longer"),
    "a header of half a gigabyte": (pax_bomb(), "exceeds 1048576 bytes"),
    "pickle": (tar_gz([MEMBERS[0], ("adapter_model.bin", b"x")]), "never read"),
    "no config": (tar_gz(MEMBERS[1:]), "no adapter_config"),
}


BOMBS: dict[str, bytes] = {
    "a bomb": tar_gz([MEMBERS[0], (WEIGHTS_NAME, bytes(2**26))]),
    "a bomb in a zip": zipped([MEMBERS[0], (WEIGHTS_NAME, bytes(2**26))]),
    "a bomb that would be skipped": tar_gz([*MEMBERS, ("notes.txt", bytes(2**26))]),
    "many that are large together": tar_gz([*MEMBERS, *((f"{i}.txt", bytes(2**17)) for i in range(9))]),
    "a config of 2 MiB": zipped([(CONFIG_NAME, bytes(2**21)), MEMBERS[1]]),
    "a zip that promises gigabytes": zip_with_lying_size(2**32 - 2),
}


# fields of a config beside those that are sound
CONFIGS: list[tuple[dict[str, Any], type[AdapterError], str]] = [
    ({"peft_type": "IA3"}, AdapterUnsupported, "peft_type is 'IA3'"),
    ({"bias": "most"}, AdapterInvalid, "bias = 'most'"),
    ({"trainable_token_indices": [-1]}, AdapterInvalid, "trainable_token_indices"),
    ({"trainable_token_indices": {"wte": [1, 1]}}, AdapterInvalid, "names a token twice"),
    ({"init_lora_weights": "pissa"}, AdapterUnsupported, "init_lora_weights = 'pissa'"),
    ({"use_qalora": True}, AdapterUnsupported, "use_qalora"),
    ({"alora_invocation_tokens": [-1]}, AdapterInvalid, "alora_invocation_tokens = [-1]"),
    ({"alora_invocation_tokens": [1], "use_dora": True}, AdapterUnsupported, "use_dora = True"),
    ({"from_the_future": 3}, AdapterUnsupported, "from_the_future = 3"),
    ({"r": "eight"}, AdapterInvalid, "r = 'eight'"),
    ({"r": 0}, AdapterInvalid, "r = 0"),
    ({"lora_alpha": -1}, AdapterInvalid, "lora_alpha = -1"),
    ({"lora_alpha": float("nan")}, AdapterInvalid, "lora_alpha = nan"),
    ({"lora_alpha": float("inf")}, AdapterInvalid, "lora_alpha = inf"),
    ({"lora_alpha": 10**400}, AdapterInvalid, "lora_alpha = 1000"),
    ({"alpha_pattern": {"q": float("nan")}}, AdapterInvalid, "alpha_pattern"),
    ({"rank_pattern": {"q": 0.5}}, AdapterInvalid, "rank_pattern"),
    ({"x" * 900_000: 1}, AdapterUnsupported, "xxx..."),
    ({"use_dora": "yes"}, AdapterInvalid, "use_dora = 'yes'"),
    ({"target_modules": "(q_proj"}, AdapterInvalid, "not a regular expression"),
    ({"target_modules": "(?:q_proj){e<=2}"}, AdapterInvalid, "target_modules: '(?:q_proj){e<=2}' has '{'"),
    ({"target_modules": ".*[[:alpha:]]_proj"}, AdapterInvalid, "'[[:alpha:]', which is not read alike everywhere"),
    ({"target_modules": "[a-z--q]_proj"}, AdapterInvalid, "not read alike everywhere"),
    ({"target_modules": r".*\p{L}_proj"}, AdapterInvalid, "not read alike everywhere"),
    ({"target_modules": "(?<name>q)_proj"}, AdapterInvalid, "not a regular expression"),
    ({"exclude_modules": "q_proj{e}"}, AdapterInvalid, "exclude_modules: 'q_proj{e}' has '{'"),
    ({"alpha_pattern": {"q_proj{e}": 40}}, AdapterInvalid, "alpha_pattern: 'q_proj{e}' has '{'"),
    ({"rank_pattern": {"(?i)q_proj": 4}}, AdapterInvalid, "rank_pattern: '(?i)q_proj' is not a regular expression"),
    ({"modules_to_save": ["(norm"]}, AdapterInvalid, "modules_to_save: '(norm' is not a regular expression"),
    ({"layers_pattern": "h{e}"}, AdapterInvalid, "layers_pattern: 'h{e}' has '{'"),
    ({"init_lora_weights": 2}, AdapterInvalid, "init_lora_weights = 2 is not valid"),
    ({"target_modules": [1]}, AdapterInvalid, "not a list of module names"),
    ({"rank_pattern": {"q": "x"}}, AdapterInvalid, "rank_pattern"),
    ({"layers_to_transform": "all"}, AdapterInvalid, "layers_to_transform = 'all'"),
]
