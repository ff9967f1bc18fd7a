"""Sums, products and picked rows against torch, to the last bit, and which calls are not made."""

from __future__ import annotations

import pytest
import torch

from loraplex.kernels.fused.cpu_elementwise import (
    Call,
    add,
    elementwise_reference,
    is_available,
    multiply,
    pick_rows,
)

pytestmark = pytest.mark.skipif(not is_available(), reason="the kernels were not built: no compiler")

TYPES = [torch.float32, torch.bfloat16]
SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3.3e38, -3.3e38, 1.0, 257.0]


def made(call: Call | None) -> None:
    assert call is not None
    kernel, arguments = call
    kernel(*arguments)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 17), (2, 5, 576), (64, 1536)])
@pytest.mark.parametrize("operation", [add, multiply])
def test_results_are_torchs(operation: object, shape: tuple[int, ...], dtype: torch.dtype, threads: int) -> None:
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    y = torch.full(shape, torch.nan, dtype=dtype)
    made((add if operation is add else multiply)(a, b, y))
    assert torch.equal(y, a + b if operation is add else a * b)
    expected = elementwise_reference("add" if operation is add else "multiply", a, b)
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps / 2, atol=1e-30)


@pytest.mark.parametrize("dtype", TYPES)
def test_results_are_torchs_where_numbers_end(dtype: torch.dtype) -> None:
    a = torch.tensor(SPECIAL).repeat(len(SPECIAL)).to(dtype)
    b = torch.tensor(SPECIAL).repeat_interleave(len(SPECIAL)).to(dtype)
    for operation, expected in ((add, a + b), (multiply, a * b)):
        y = torch.zeros_like(a)
        made(operation(a, b, y))
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float16, torch.int64])
@pytest.mark.parametrize("rows", [[], [4], [[0, 2], [6, 2]]])
def test_rows_are_picked(rows: list[int], dtype: torch.dtype) -> None:
    table = torch.arange(7 * 5).view(7, 5).to(dtype)
    index = torch.tensor(rows, dtype=torch.int64)
    y = torch.zeros(*index.shape, 5, dtype=dtype)
    made(pick_rows(table, index, y))
    assert torch.equal(y, table[index])


def test_rows_outside_of_the_table_read_nothing() -> None:
    table, y = torch.arange(6.0).view(3, 2), torch.zeros(4, 2)
    made(pick_rows(table, torch.tensor([-1, -4, 3, 0]), y))
    assert torch.equal(y[[0, 3]], table[[2, 0]])
    assert y[1:3].isnan().all()


def test_what_does_not_lie_so_is_left_to_torch() -> None:
    square, other = torch.zeros(4, 4), torch.zeros(4, 4)
    assert add(square, other.t(), square) is None
    assert add(square, other[:1], square) is None
    assert add(square, other.bfloat16(), square) is None
    assert multiply(square.double(), square.double(), square.double()) is None
    assert pick_rows(square, torch.zeros(2, dtype=torch.int32), torch.zeros(2, 4)) is None
    assert pick_rows(square, torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3)) is None
    assert pick_rows(torch.zeros(4, 3).t(), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4)) is None
