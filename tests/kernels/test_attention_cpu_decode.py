"""Attention of single tokens in C against the formula: groups of heads, windows, caps, sinks, lengths, both types."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraplex.kernels.attention.cpu_decode import WIDEST, DecodeRows, is_available, write
from loraplex.kernels.attention.paged import Form, attend_reference
from loraplex.kernels.built import Argument, Kernel, listening

CPU = torch.device("cpu")
LENGTHS = (1, 2, 63, 64, 65, 200)  # about the borders of the kernel's blocks
NUM_SLOTS = 300
FORMS = {
    "plain": Form(0.2),
    "window": Form(0.2, window=70),
    "cap": Form(0.5, softcap=1.5),
    "sinks": Form(0.2, sinks=torch.linspace(-3, 3, 12)),
    "all": Form(0.3, window=5, softcap=2.0, sinks=torch.linspace(3, -3, 12)),
}

pytestmark = pytest.mark.skipif(
    not is_available(torch.float32, CPU, 1, 1), reason="the kernel was not built: no compiler"
)


class Case:
    """Rows of all lengths over one cache in random order; what must not be read is not a number."""

    def __init__(self, key_heads: int, width: int, value_width: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(width)
        self.q = torch.randn(len(LENGTHS), 12, width, generator=generator).to(dtype)
        self.keys = torch.randn(NUM_SLOTS, key_heads, width, generator=generator).to(dtype)
        self.values = torch.randn(NUM_SLOTS, key_heads, value_width, generator=generator).to(dtype)
        self.keys[-1], self.values[-1] = float("nan"), float("nan")
        self.slots = torch.full((len(LENGTHS), max(LENGTHS)), NUM_SLOTS - 1)
        for row, length in enumerate(LENGTHS):
            self.slots[row, :length] = torch.randperm(NUM_SLOTS - 1, generator=generator)[:length]
        self.lengths = torch.tensor(LENGTHS)

    def attend(self, form: Form) -> Tensor:
        return DecodeRows(self.slots, self.lengths).attend(self.q, self.keys, self.values, form)

    def expected(self, form: Form) -> Tensor:
        """Row by row, in float32. Shape [B, H, Dv]."""
        rows = []
        for row, length in enumerate(LENGTHS):
            own = self.slots[row, :length]
            k, v = (cache[own].float().transpose(0, 1)[None] for cache in (self.keys, self.values))
            mask = torch.arange(length) >= length - (form.window or length)
            rows.append(
                attend_reference(self.q[row].float()[None, :, None], k, v, mask[None, None, None], form)[0, :, 0]
            )
        return torch.stack(rows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key_heads", [1, 4, 6, 12])
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (24, 17), (5, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_equals_the_formula(
    form: str, key_heads: int, width: int, value_width: int, dtype: torch.dtype, threads: int
) -> None:
    """bfloat16: inputs are the same; only the rounding of the result differs, half a unit in the last of 8 bits."""
    case = Case(key_heads, width, value_width, dtype)
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2**-8, 1e-5)
    torch.testing.assert_close(case.attend(FORMS[form]).float(), case.expected(FORMS[form]), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_in_any_company_to_the_last_bit(dtype: torch.dtype, threads: int) -> None:
    case = Case(4, 64, 64, dtype)
    together = case.attend(FORMS["window"])
    for row, length in enumerate(LENGTHS):
        alone = DecodeRows(case.slots[row : row + 1, :length].contiguous(), case.lengths[row : row + 1])
        assert torch.equal(
            alone.attend(case.q[row : row + 1], case.keys, case.values, FORMS["window"])[0], together[row]
        )


def test_scores_far_apart_and_far_below_give_what_softmax_gives() -> None:
    case = Case(12, 64, 64, torch.float32)
    form = Form(30.0)
    torch.testing.assert_close(case.attend(form), case.expected(form), rtol=1e-4, atol=1e-4)


def test_row_that_looks_at_nothing_gets_zeros() -> None:
    case = Case(4, 64, 64, torch.float32)
    case.lengths[3] = 0
    out = case.attend(FORMS["sinks"])
    assert not out[3].any()
    assert out[[0, 1, 2, 4, 5]].any(dim=2).all()


def test_what_is_not_a_number_stays_in_its_row() -> None:
    case = Case(4, 64, 64, torch.float32)
    case.slots[2, 7] = NUM_SLOTS - 1
    out = case.attend(FORMS["plain"])
    assert torch.isnan(out[2]).all()
    assert torch.isfinite(out[[0, 1, 3, 4, 5]]).all()


def test_rows_that_become_others_are_attended_as_these() -> None:
    """A call that is made again, with what it points to, sees them as well."""
    case = Case(4, 64, 64, torch.float32)
    rows = DecodeRows(torch.zeros(len(LENGTHS), 1, dtype=torch.int64), torch.ones(len(LENGTHS), dtype=torch.int64))
    calls: list[tuple[Kernel, tuple[Argument, ...]]] = []
    with listening(lambda kernel, arguments: calls.append((kernel, arguments))):
        out = rows.attend(case.q, case.keys, case.values, FORMS["plain"])
    rows.become(case.slots, case.lengths)
    [(kernel, arguments)] = calls
    kernel(*arguments)
    torch.testing.assert_close(out, case.expected(FORMS["plain"]), rtol=1e-4, atol=1e-5)
    assert torch.equal(rows.attend(case.q, case.keys, case.values, FORMS["plain"]), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_lies_where_it_was_told_to(dtype: torch.dtype) -> None:
    """Of heads that lie in any order, and of numbers that are not side by side."""
    slots = torch.tensor([7, 0, 4])
    numbers = torch.randn(3, 5, 2).to(dtype)
    for seen in (numbers.transpose(0, 1), numbers.transpose(0, 1).contiguous(), numbers.permute(2, 0, 1)):
        cache = torch.zeros(9, seen.shape[0], seen.shape[2], dtype=dtype)
        expected = cache.clone().index_copy_(0, slots, seen.transpose(0, 1))
        write(seen, cache, slots)
        assert torch.equal(cache, expected)
    with pytest.raises(ValueError, match="float64"):
        write(numbers.double(), cache, slots)


def test_kernel_is_for_cpus_types_and_widths_it_knows() -> None:
    assert is_available(torch.bfloat16, CPU, WIDEST, WIDEST)
    assert not is_available(torch.float32, CPU, 64, WIDEST + 1)
    assert not is_available(torch.float16, CPU, 64, 64)
    assert not is_available(torch.float32, torch.device("cuda"), 64, 64)


def test_queries_of_another_type_than_the_cache_are_refused() -> None:
    case = Case(4, 64, 64, torch.bfloat16)
    case.q = case.q.float()
    with pytest.raises(ValueError, match=r"q is torch\.float32, the cache torch\.bfloat16"):
        case.attend(FORMS["plain"])
