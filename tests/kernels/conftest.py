"""What the tests of kernels in C share."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from loraplex.kernels.built import library
from loraplex.kernels.dense import linear
from loraplex.kernels.lora import decode


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture(params=["as the CPU can", "widened"])
def bfloat16_is(request: pytest.FixtureRequest) -> Iterator[str]:
    """A CPU that multiplies bfloat16 by itself is kept from it in turn: others widen it."""
    libraries = [built for built in map(library, (linear.__file__, decode.__file__)) if built is not None]
    flags = [ctypes.c_int.in_dll(built, "loraplex_pairs") for built in libraries]
    one = torch.zeros(1, 1, dtype=torch.bfloat16)
    linear.Linear(one)(one)  # which asks the CPU
    before = [flag.value for flag in flags]
    assert before[0] in (0, 1)
    if request.param == "widened":
        for flag in flags:
            flag.value = 0
    yield request.param
    for flag, value in zip(flags, before, strict=True):
        flag.value = value
