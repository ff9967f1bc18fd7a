"""The header's parser against files of safetensors itself, and against every lie a header can tell."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, save
from support.adapter_files import weights

from loraplex.engines.adapters.safetensors_header import MAX_HEADER_BYTES, TensorInfo, read_header
from loraplex.engines.errors import AdapterInvalid


def with_header(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def tensor(begin: int = 0, end: int = 8, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read(tmp_path: Path, content: bytes) -> dict[str, TensorInfo]:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    return read_header(path)


def test_read_header_agrees_with_safetensors(tmp_path: Path) -> None:
    content = save(
        {"a": np.ones((2, 3), np.float32), "b": np.ones((), np.int64), "empty": np.ones((0, 4), np.float16)},
        metadata={"format": "pt"},
    )
    header = read(tmp_path, content)
    for name, array in load(content).items():
        info = header[name]
        assert content[info.begin : info.end] == array.tobytes()
        assert info.shape == array.shape


def test_read_header_without_tensors(tmp_path: Path) -> None:
    assert read(tmp_path, with_header({})) == {}
    assert read(tmp_path, with_header({"__metadata__": {"a": "b"}})) == {}


BAD: dict[str, tuple[bytes, str]] = {
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


@pytest.mark.parametrize("case", BAD)
def test_read_header_names_what_is_wrong(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    with pytest.raises(AdapterInvalid, match=message) as caught:
        read(tmp_path, content)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_read_header_many_names_with_the_last_twice_is_quick(tmp_path: Path) -> None:
    entries = ",".join(f'"{number}":0' for number in range(200_000))
    with pytest.raises(AdapterInvalid, match="'199999' twice"):
        read(tmp_path, with_header(f'{{{entries},"199999":0}}'.encode()))


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=5) | st.just("F32"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
_ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "F4", "BF16"]) | _VALUES}
    | {"shape": st.lists(st.integers(-1, 4), max_size=3) | _VALUES}
    | {"data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | _VALUES}
)
_HEADERS = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), _ENTRIES | _VALUES, max_size=4)
_quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@_quick
@given(header=_HEADERS, data=st.binary(max_size=48))
def test_read_header_any_header_is_sound_or_invalid(tmp_path: Path, header: object, data: bytes) -> None:
    check_sound_or_invalid(tmp_path, with_header(header, data))


@_quick
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6), cut=st.integers(0, 40))
def test_read_header_mutated_file_is_sound_or_invalid(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(weights())
    for position, value in changes:
        content[position] = value
    check_sound_or_invalid(tmp_path, bytes(content[: len(content) - cut]))


def check_sound_or_invalid(tmp_path: Path, content: bytes) -> None:
    """What we take, safetensors takes too, unless it knows the dtype but numpy does not."""
    try:
        header = read(tmp_path, content)
    except AdapterInvalid:
        return
    assert sum(info.end - info.begin for info in header.values()) <= len(content)
    try:
        load(content)
    except SafetensorError as error:
        pytest.fail(f"safetensors refuses what we took: {error}")
    except (KeyError, TypeError, ValueError, AttributeError):
        assert any(info.dtype not in {"F32", "F16"} for info in header.values())
