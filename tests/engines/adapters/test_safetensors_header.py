"""The header's parser against files of safetensors itself, and against every lie a header can tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, save
from support.adapter_files import weights
from support.hostile_adapters import HEADERS, with_header

from loraplex.engines.adapters.safetensors_header import TensorInfo, read_header
from loraplex.engines.errors import AdapterInvalid


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


@pytest.mark.parametrize("case", HEADERS)
def test_read_header_names_what_is_wrong(tmp_path: Path, case: str) -> None:
    content, message = HEADERS[case]
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
