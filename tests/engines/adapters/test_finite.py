"""NaN and infinity in a file of weights, found where torch finds them, in every dtype and at every border."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraplex.engines.adapters.finite import PIECE_BYTES, check_finite
from loraplex.engines.adapters.safetensors_header import read_header
from loraplex.engines.errors import AdapterInvalid

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def check(path: Path) -> None:
    check_finite(path, read_header(path).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_check_finite_takes_the_largest_and_smallest_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    edges = [limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, -0.0, limits.eps]
    tensors = {"edges": torch.tensor(edges, dtype=dtype), "none": torch.zeros(0, 4, dtype=dtype)}
    save_file(tensors | {"one": torch.zeros((), dtype=dtype), "ids": torch.full((8,), -1)}, tmp_path / "a")
    check(tmp_path / "a")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_check_finite_names_the_tensor_and_the_place(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    width = PIECE_BYTES // dtype.itemsize
    for row, column in ((0, 0), (0, width - 1), (1, 0), (2, 5)):
        bad = torch.ones(3, width, dtype=dtype)
        bad[row, column] = value
        save_file({"fine": torch.ones(7, dtype=dtype), "it.is.here": bad}, tmp_path / "a")
        with pytest.raises(AdapterInvalid) as caught:
            check(tmp_path / "a")
        assert str(caught.value) == f"tensor 'it.is.here' has a NaN or an infinity at [{row}, {column}]"


def test_check_finite_reads_a_scalar(tmp_path: Path) -> None:
    save_file({"scale": torch.tensor(torch.inf)}, tmp_path / "a")
    with pytest.raises(AdapterInvalid, match=r"tensor 'scale' has a NaN or an infinity at \[\]"):
        check(tmp_path / "a")
