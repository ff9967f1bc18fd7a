"""The decode kernel against the formula, token by token: any mix of ranks, types, widths, threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.mixes import MIXES, owners

from loraplex.kernels.built import Argument, Kernel, listening
from loraplex.kernels.lora.decode import (
    AdapterRows,
    CurrentStep,
    DecodeStep,
    DecodeTable,
    add_decode,
    has_tiles,
    is_available,
)
from loraplex.kernels.lora.grouped import add_grouped_reference

CPU = torch.device("cpu")
TOKENS = 24
RANKS = (1, 8, 0, 64, 5, 130)  # 0: an adapter that does not touch the second module
SCALES = (2.0, 0.5, 1.0, 0.25, 1.5, -1.0)
WIDTHS = [(33, 47), (256, 688), (64, 31), (24, 4500), (2080, 96)]  # in, out of the table's modules

MANY = 150  # tokens: whole tiles of sixteen and parts of one, and more than threads share by ranks

needs_tiles = pytest.mark.skipif(not has_tiles(torch.bfloat16, CPU), reason="the CPU has no tile registers")
pytestmark = pytest.mark.skipif(not is_available(torch.float32, CPU), reason="the kernel was not built: no compiler")


class Adapters:
    """Random adapters for all modules, each in memory of its own, and their table."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(7)
        self.flats: list[torch.Tensor] = []
        rows: list[AdapterRows] = []
        for rank, scale in zip(RANKS, SCALES, strict=True):
            sizes = [rank * width for widths in WIDTHS for width in widths]
            offsets = np.cumsum([0, *sizes]).astype(np.uint64) * dtype.itemsize
            ranks = np.full(len(WIDTHS), rank, dtype=np.int32)
            scales = np.full(len(WIDTHS), scale, dtype=np.float32)
            self.flats.append(torch.randn(max(sum(sizes), 1), generator=generator).div(8).to(dtype))
            rows.append(AdapterRows(offsets[0:-1:2].copy(), offsets[1:-1:2].copy(), ranks, scales))
        starts = [flat.data_ptr() for flat in self.flats]
        self.table = DecodeTable([i for i, _ in WIDTHS], [o for _, o in WIDTHS], rows, starts)

    def stacked(self, module: int) -> tuple[torch.Tensor, torch.Tensor]:
        """a: Shape [R, in]. b: Shape [R, out]. In float64."""
        parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for rank, flat in zip(RANKS, self.flats, strict=True):
            begin = rank * sum(width for widths in WIDTHS[:module] for width in widths)
            for part, width in zip(parts, WIDTHS[module], strict=True):
                part.append(flat[begin : begin + rank * width].view(rank, width).double())
                begin += rank * width
        return torch.cat(parts[0]), torch.cat(parts[1])


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("module", range(len(WIDTHS)))
def test_decode_equals_the_formula(mix: str, dtype: torch.dtype, module: int, threads: int, bfloat16_is: str) -> None:
    """float32: only the order of sums differs. bfloat16: one rounding of y, half a unit in the last of 8 bits."""
    adapters = Adapters(dtype)
    generator = torch.Generator().manual_seed(8)
    x, y = (torch.randn(TOKENS, width, generator=generator).to(dtype) for width in WIDTHS[module])
    owner = owners(mix, len(RANKS), TOKENS)
    expected = y.double()
    first = [sum(RANKS[:group]) for group in range(len(RANKS) + 1)]
    add_grouped_reference(expected, x.double(), *adapters.stacked(module), torch.tensor(owner), first, SCALES)
    add_decode(y, x, module, DecodeStep(adapters.table, owner))
    rtol, atol = (1e-5, 1e-4) if dtype == torch.float32 else (2**-8, 1e-4)
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("module", range(len(WIDTHS)))
def test_what_a_token_gets_depends_on_no_other(dtype: torch.dtype, module: int, threads: int, bfloat16_is: str) -> None:
    """Not in its last bit: alone, or beside others of its adapter and of other adapters."""
    adapters = Adapters(dtype)
    generator = torch.Generator().manual_seed(9)
    x, before = (torch.randn(TOKENS, width, generator=generator).to(dtype) for width in WIDTHS[module])
    owner = owners("skewed", len(RANKS), TOKENS)
    together = before.clone()
    add_decode(together, x, module, DecodeStep(adapters.table, owner))
    assert not torch.equal(together, before)
    for token in range(TOKENS):
        alone = before[token : token + 1].clone()
        add_decode(alone, x[token : token + 1].clone(), module, DecodeStep(adapters.table, [owner[token]]))
        assert torch.equal(alone[0], together[token])


@needs_tiles
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("module", range(len(WIDTHS)))
@pytest.mark.parametrize("lies", ["together", "apart"])
def test_tiles_equal_the_formula(mix: str, module: int, lies: str, threads: int) -> None:
    """One rounding of y; what A gives keeps 16 bits, which is 2⁻¹⁷ of it. With weights, and each adapter's tokens in a
    row or not."""
    adapters = Adapters(torch.bfloat16)
    generator = torch.Generator().manual_seed(8)
    x, y = (torch.randn(MANY, width, generator=generator).bfloat16() for width in WIDTHS[module])
    owner = owners(mix, len(RANKS), MANY)
    if lies == "together":
        owner = sorted(owner)
    expected = y.double()
    first = [sum(RANKS[:group]) for group in range(len(RANKS) + 1)]
    add_grouped_reference(expected, x.double(), *adapters.stacked(module), torch.tensor(owner), first, SCALES)
    weights = [1.0 if token % 2 else -0.5 for token in range(MANY)]
    expected[::2] = y.double()[::2] - 0.5 * (expected[::2] - y.double()[::2])
    add_decode(y, x, module, DecodeStep(adapters.table, owner, weights, in_tiles=True))
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-4)


@needs_tiles
@pytest.mark.parametrize("module", range(len(WIDTHS)))
def test_what_a_token_gets_in_tiles_depends_on_no_other(module: int, threads: int) -> None:
    """Not in its last bit: alone, or beside others of its adapter and of other adapters."""
    adapters = Adapters(torch.bfloat16)
    generator = torch.Generator().manual_seed(9)
    x, before = (torch.randn(MANY, width, generator=generator).bfloat16() for width in WIDTHS[module])
    owner = owners("skewed", len(RANKS), MANY)
    together = before.clone()
    add_decode(together, x, module, DecodeStep(adapters.table, owner, in_tiles=True))
    assert not torch.equal(together, before)
    for token in range(0, MANY, 7):
        alone = before[token : token + 1].clone()
        add_decode(
            alone, x[token : token + 1].clone(), module, DecodeStep(adapters.table, [owner[token]], in_tiles=True)
        )
        assert torch.equal(alone[0], together[token])


def test_token_without_an_adapter_is_not_touched() -> None:
    adapters = Adapters(torch.float32)
    x, y = torch.randn(3, 33), torch.full((3, 47), float("nan"))
    y[1] = 0.0
    add_decode(y, x, 0, DecodeStep(adapters.table, [-1, 3, -1]))
    assert torch.isnan(y[[0, 2]]).all()
    assert torch.isfinite(y[1]).all()


def test_weights_multiply_the_scale() -> None:
    adapters = Adapters(torch.float32)
    x = torch.randn(2, 33).expand(2, 33).contiguous()
    x[1] = x[0]
    y = torch.zeros(2, 47)
    add_decode(y, x, 0, DecodeStep(adapters.table, [3, 3], weights=[1.0, -2.0]))
    torch.testing.assert_close(y[1], -2.0 * y[0])


def test_current_step_is_the_one_that_it_became() -> None:
    """Of whichever table; a call that is made again, with what it points to, sees it as well."""
    current = CurrentStep()
    calls: list[tuple[Kernel, tuple[Argument, ...]]] = []
    x, y = torch.randn(3, 33), torch.zeros(3, 47)
    for seed, owner in enumerate(([3, -1, 1], [-1, 0, 0], [-1, -1, -1])):
        adapters = Adapters(torch.float32)
        step = DecodeStep(adapters.table, owner, weights=[1.0, 0.5, -1.0])
        expected = torch.zeros(3, 47)
        add_decode(expected, x, 0, step)
        current.become(step)
        y.zero_()
        if seed == 0:
            with listening(lambda kernel, arguments: calls.append((kernel, arguments))):
                add_decode(y, x, 0, current)
        else:
            [(kernel, arguments)] = calls
            kernel(*arguments)
        assert torch.equal(y, expected)
        assert y.any(dim=1).tolist() == [number >= 0 for number in owner]


@pytest.mark.parametrize("in_tiles", [False, pytest.param(True, marks=needs_tiles)])
def test_adapter_that_is_not_a_number_harms_its_own_tokens_alone(in_tiles: bool) -> None:
    adapters = Adapters(torch.bfloat16)
    adapters.flats[3].fill_(float("nan"))
    x, y = torch.randn(2, 33).bfloat16(), torch.zeros(2, 47).bfloat16()
    add_decode(y, x, 0, DecodeStep(adapters.table, [3, 1], in_tiles=in_tiles))
    assert torch.isnan(y[0]).all()
    assert torch.isfinite(y[1]).all()


def test_outputs_of_another_type_than_inputs_are_refused() -> None:
    step = CurrentStep()
    with pytest.raises(ValueError, match=r"x is torch\.float32, y torch\.bfloat16"):
        add_decode(torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(1, 8), 0, step)


def test_kernel_is_for_cpus_and_types_it_knows() -> None:
    assert not is_available(torch.float16, CPU)
    assert not is_available(torch.float32, torch.device("cuda"))
