"""The linear layer in C against the formula: any numbers of tokens, inputs and outputs, both types, 1 or 2 threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.cpu_flags import can_use_panels, flag, panels_wanted

from loraplex.engines.pages import in_large_pages
from loraplex.kernels.dense import linear as kernel
from loraplex.kernels.dense.linear import (
    Linear,
    Panels,
    int8_size,
    is_available,
    linear_reference,
    pack,
    panels_size,
    round_and_pack,
    rounded_reference,
)

CPU = torch.device("cpu")
FEATURES = [  # in, out: about the borders
    (1, 1), (7, 50), (100, 257), (2048, 24), (2049, 5), (4096, 31), (4100, 49), (2080, 300),
]  # fmt: skip
NUM_TOKENS = (0, 1, 2, 3, 4, 5, 8, 9, 64, 65, 131, 300)

pytestmark = pytest.mark.skipif(not is_available(torch.float32, CPU), reason="the kernel was not built: no compiler")


def uses_tiles() -> bool:
    Linear(*a_layer(100, 257, torch.bfloat16))(torch.zeros(2, 100).bfloat16())  # which asks the CPU
    return flag(kernel, "loraplex_tiles").value == 1


def packed(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """As `Linear`, of panels, which the weight is not needed beside."""
    with panels_wanted(True):
        panels = in_large_pages(panels_size(weight))
    panels.fill_(0xFF)  # NaN, wherever nothing is written
    own = weight.clone()
    pack(own, panels)
    linear = Linear(own, bias, Panels(panels))
    own.fill_(float("nan"))
    return linear


def rounded(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """The same in int8."""
    panels = in_large_pages(int8_size(weight))
    panels.fill_(0x7F)
    own = weight.clone()
    linear = Linear(own, bias, Panels(panels, round_and_pack(own, panels)))
    own.fill_(float("nan"))
    return linear


NEEDS_PANELS = pytest.mark.skipif(not can_use_panels(), reason="this CPU has no AVX2")
WAYS_OF_PANELS = pytest.mark.parametrize(
    "bfloat16_is", ["as the CPU can", "widened", "widened in short vectors"], indirect=True
)
PACKED_FORMS = pytest.mark.parametrize("form", [packed, rounded], ids=["panels", "int8"])
FORMS = pytest.mark.parametrize(
    "form",
    [Linear, pytest.param(packed, marks=NEEDS_PANELS), pytest.param(rounded, marks=NEEDS_PANELS)],
    ids=["rows", "panels", "int8"],
)


def a_layer(
    num_in: int, num_out: int, dtype: torch.dtype, *, has_bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(num_in)
    weight = torch.randn(num_out, num_in, generator=generator).div(num_in**0.5).to(dtype)
    return weight, torch.randn(num_out, generator=generator).to(dtype) if has_bias else None


def check_formula(form: Callable[..., Linear], num_in: int, num_out: int, dtype: torch.dtype, has_bias: bool) -> None:
    """float32: only the order of sums differs. bfloat16: one rounding of y, half a unit in the last of 8 bits."""
    weight, bias = a_layer(num_in, num_out, dtype, has_bias=has_bias)
    linear = form(weight, bias)
    weight = rounded_reference(weight) if form is rounded else weight
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, num_in, generator=torch.Generator().manual_seed(num_tokens)).to(dtype)
        rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2**-8, 1e-5)
        torch.testing.assert_close(linear(x).double(), linear_reference(x, weight, bias), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("num_in", "num_out"), FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_equals_the_formula(
    num_in: int, num_out: int, dtype: torch.dtype, has_bias: bool, threads: int, bfloat16_is: str
) -> None:
    check_formula(Linear, num_in, num_out, dtype, has_bias)


@NEEDS_PANELS
@pytest.mark.parametrize(("num_in", "num_out"), FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
@WAYS_OF_PANELS
@PACKED_FORMS
def test_linear_in_panels_equals_the_formula(
    form: Callable[..., Linear],
    num_in: int,
    num_out: int,
    dtype: torch.dtype,
    has_bias: bool,
    threads: int,
    bfloat16_is: str,
) -> None:
    check_formula(form, num_in, num_out, dtype, has_bias)


@NEEDS_PANELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_as_bitsandbytes_does(dtype: torch.dtype) -> None:
    """But for numbers halfway between two steps, for it multiplies by the reciprocal of a scale."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight, _ = a_layer(100, 257, dtype)
    weight[5] = 0
    steps, largest, _ = functional.int8_vectorwise_quant(weight.float())
    scales = round_and_pack(weight, in_large_pages(int8_size(weight)))
    torch.testing.assert_close(scales, largest / 127)
    found = rounded_reference(weight) / torch.where(scales > 0, scales, 1)[:, None]
    assert (found.round() - steps).abs().max() <= 1
    assert (found.round() != steps).float().mean() < 1e-3


@NEEDS_PANELS
def test_output_with_a_weight_that_is_not_finite_is_no_number() -> None:
    weight, _ = a_layer(100, 257, torch.float32)
    weight[2, 3], weight[7, 99] = float("inf"), float("nan")
    y = rounded(weight)(torch.randn(3, 100))
    assert torch.isnan(y).any(dim=0).nonzero()[:, 0].tolist() == [2, 7]


def check_company(form: Callable[..., Linear], dtype: torch.dtype, width: int) -> None:
    linear = form(*a_layer(width, 53, dtype))
    x = torch.randn(280, width).to(dtype)
    together = linear(x)
    few = 3 if form is Linear and dtype == torch.bfloat16 and uses_tiles() else 0  # rows that are not computed in tiles
    for begin in [*range(70), 250, 260]:
        lengths = {1 + few, 2 + few, 5, 9, 70 - begin, 280 - begin}
        for end in (begin + length for length in lengths if length > few and begin + length <= 280):
            assert torch.equal(linear(x[begin:end]), together[begin:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2100, 4096])
def test_a_row_is_the_same_in_any_company_to_the_last_bit(
    dtype: torch.dtype, width: int, threads: int, bfloat16_is: str
) -> None:
    check_company(Linear, dtype, width)


@NEEDS_PANELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2100, 4096])
@WAYS_OF_PANELS
@PACKED_FORMS
def test_a_row_in_panels_is_the_same_in_any_company_to_the_last_bit(
    form: Callable[..., Linear], dtype: torch.dtype, width: int, threads: int, bfloat16_is: str
) -> None:
    check_company(form, dtype, width)


def test_rows_may_stand_in_any_number_of_dimensions_and_apart(bfloat16_is: str) -> None:
    linear = Linear(*a_layer(100, 257, torch.bfloat16))
    x = torch.randn(2, 9, 100).bfloat16()
    assert torch.equal(linear(x)[1, 4:], linear(x[1, 4:]))
    assert torch.equal(linear(x[1, 4]), linear(x[1:, 4])[0])
    assert torch.equal(linear(x[:, ::2]), linear(x)[:, ::2])


def check_nan(form: Callable[..., Linear]) -> None:
    """Of an odd width too, whose last pair begins in one row and would end in the next."""
    for width in (100, 101):
        check_nan_of(form, width)


def check_nan_of(form: Callable[..., Linear], width: int) -> None:
    linear = form(*a_layer(width, 257, torch.bfloat16))
    x = torch.randn(12, width).bfloat16()
    x[3] = float("nan")
    y = linear(x)
    assert torch.isnan(y[3]).all()
    assert torch.isfinite(y[[row for row in range(12) if row != 3]]).all()


def test_what_is_not_a_number_stays_in_its_row(bfloat16_is: str) -> None:
    check_nan(Linear)


@NEEDS_PANELS
@WAYS_OF_PANELS
@PACKED_FORMS
def test_what_is_not_a_number_stays_in_its_row_of_panels(form: Callable[..., Linear], bfloat16_is: str) -> None:
    check_nan(form)


@FORMS
def test_layers_are_computed_in_several_threads_at_once(form: Callable[..., Linear]) -> None:
    """Each thread has scratch of its own, which grows with the widest step."""
    linear = form(*a_layer(2048, 100, torch.bfloat16))
    steps = [torch.randn(num_tokens, 2048).bfloat16() for num_tokens in (2, 40, 3, 300, 5, 130, 64, 17)]
    expected = [linear(x) for x in steps]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(linear, steps * 8))
    assert all(torch.equal(y, wanted) for y, wanted in zip(found, expected * 8, strict=True))


def test_kernel_is_for_cpus_and_types_it_knows() -> None:
    assert not is_available(torch.float16, CPU)
    assert not is_available(torch.float32, torch.device("cuda"))


@pytest.mark.parametrize("x", [torch.ones(2, 100), torch.ones(2, 99).bfloat16()], ids=["type", "width"])
def test_rows_of_another_type_or_width_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"the weight 100 and torch\.bfloat16"):
        Linear(*a_layer(100, 257, torch.bfloat16))(x)


def test_what_a_cpu_has_is_used() -> None:
    """By what Linux says of the CPU; compilers before GCC 12 know no tile registers."""
    told = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if "amx_bf16" not in told:
        pytest.skip("this CPU has no AMX")
    assert uses_tiles()


def test_weights_are_packed_where_a_cpu_has_nothing_better() -> None:
    """Tile registers are better, and for bfloat16 alone."""
    flag(kernel, "loraplex_panels").value = -1
    sizes = [panels_size(torch.zeros(17, 3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    wanted = [can_use_panels(), can_use_panels() and not uses_tiles()]
    assert sizes == [size if is_packed else 0 for size, is_packed in zip([2 * 3 * 64, 2 * 2 * 64], wanted, strict=True)]
