"""What the tests of kernels in C share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.cpu_flags import flag

from loraplex.kernels.attention import cpu_prefill
from loraplex.kernels.dense import linear
from loraplex.kernels.lora import decode


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture(params=["as the CPU can", "in pairs", "widened", "widened in short vectors"])
def bfloat16_is(request: pytest.FixtureRequest) -> Iterator[str]:
    """A CPU that multiplies bfloat16 by itself, in tile registers or in pairs, is kept from both in turn.

    At last from vectors of sixteen numbers too, as of float32.
    """
    one = torch.zeros(1, 1, dtype=torch.bfloat16)
    linear.Linear(one)(one)  # which asks the CPU
    tiles, broad = (
        [flag(module, name) for module in (linear, decode, cpu_prefill)]
        for name in ("loraplex_tiles", "loraplex_broad")
    )
    pairs = [flag(module, "loraplex_pairs") for module in (linear, decode)]
    assert all(flag.value in (0, 1) for flag in (tiles[0], pairs[0]))
    flags = {
        "as the CPU can": [],
        "in pairs": tiles,
        "widened": [*tiles, *pairs],
        "widened in short vectors": [*tiles, *pairs, *broad],
    }[request.param]
    before = [own.value for own in flags]
    for own in flags:
        own.value = 0
    yield request.param
    for own, value in zip(flags, before, strict=True):
        own.value = value
