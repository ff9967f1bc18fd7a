"""Attention of chunks in C against the formula: groups of heads, windows, caps, sinks, what lies before, both types."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraplex.kernels.attention import cpu_prefill
from loraplex.kernels.attention.cpu_prefill import WIDEST, PrefillRuns, is_available
from loraplex.kernels.attention.paged import Form, attend_reference, causal_mask

CPU = torch.device("cpu")
RUNS = ((1, 0), (31, 0), (32, 1), (33, 31), (70, 200), (128, 64))  # tokens and the position of the first
NUM_SLOTS = 600
HEADS = 12
FORMS = {
    "plain": Form(0.2),
    "window": Form(0.2, window=70),
    "cap": Form(0.5, softcap=1.5),
    "sinks": Form(0.2, sinks=torch.linspace(-3, 3, HEADS)),
    "all": Form(0.3, window=5, softcap=2.0, sinks=torch.linspace(3, -3, HEADS)),
}

pytestmark = pytest.mark.skipif(
    not is_available(torch.float32, CPU, 1, 1), reason="the kernel was not built: no compiler"
)


class Case:
    """Runs with rows of no run between them, over one cache in random order; what must not be read is not a number."""

    def __init__(self, key_heads: int, width: int, value_width: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(width)
        self.runs = []
        begin = 2
        for count, start in RUNS:
            slots = torch.randperm(NUM_SLOTS - 1, generator=generator)[: start + count]
            self.runs.append((begin, begin + count, start, slots))
            begin += count + 1
        self.q = torch.randn(begin, HEADS, width, generator=generator).to(dtype).transpose(0, 1)
        self.keys = torch.randn(NUM_SLOTS, key_heads, width, generator=generator).to(dtype)
        self.values = torch.randn(NUM_SLOTS, key_heads, value_width, generator=generator).to(dtype)
        self.keys[-1], self.values[-1] = float("nan"), float("nan")

    def attend(self, form: Form) -> Tensor:
        out = torch.full((self.q.shape[1], HEADS, self.values.shape[2]), float("nan")).to(self.q.dtype)
        PrefillRuns(self.runs).attend(self.q, self.keys, self.values, form, out)
        return out

    def expected(self, form: Form, values: Tensor) -> Tensor:
        """Run by run, in float64; not a number where there is none."""
        out = torch.full((self.q.shape[1], HEADS, values.shape[2]), float("nan"), dtype=torch.float64)
        for begin, end, start, slots in self.runs:
            k, v = (cache[slots].double().transpose(0, 1)[None] for cache in (self.keys, values))
            mask = causal_mask(start, end - begin, form.window, CPU)
            attended = attend_reference(self.q[None, :, begin:end].double(), k, v, mask, form)
            out[begin:end] = attended[0].transpose(0, 1)
        return out


def check(case: Case, form: Form, slack: float = 1e-5) -> None:
    """slack: of each weight in float32, relative.

    Of bfloat16 the result is rounded to 8 bits, and in tile registers the weights are before: each product is off by
    half a unit in the last of them.
    """
    found, expected = case.attend(form).double(), case.expected(form, case.values)
    bound = slack * case.expected(form, case.values.abs())
    if case.q.dtype == torch.bfloat16:
        bound = 1.05 * 2**-8 * (case.expected(form, case.values.abs()) + expected.abs())
    assert torch.equal(found.isnan(), expected.isnan())
    assert not ((found - expected).abs() > bound).any()


def same(one: Tensor, other: Tensor) -> bool:
    """To the last bit, and in what is not a number."""
    return torch.equal(one.nan_to_num(nan=-1e30), other.nan_to_num(nan=-1e30))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("key_heads", "width", "value_width"), [(1, 64, 64), (4, 64, 64), (4, 24, 17), (12, 5, 130), (3, 96, 48)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_equal_the_formula(
    form: str, key_heads: int, width: int, value_width: int, dtype: torch.dtype, bfloat16_is: str
) -> None:
    check(Case(key_heads, width, value_width, dtype), FORMS[form])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_are_gathered_one_by_one_where_there_is_no_room(
    dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(4, 64, 64, dtype)
    together = case.attend(FORMS["plain"])
    check(case, FORMS["plain"])
    monkeypatch.setattr(cpu_prefill, "MOST_SCRATCH", 1)
    assert same(case.attend(FORMS["plain"]), together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_may_lie_in_any_order(dtype: torch.dtype, bfloat16_is: str) -> None:
    case = Case(4, 64, 64, dtype)
    expected = case.attend(FORMS["plain"])
    for q in (case.q.contiguous(), case.q.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        case.q = q
        assert same(case.attend(FORMS["plain"]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_far_apart_and_far_below_give_what_softmax_gives(dtype: torch.dtype, bfloat16_is: str) -> None:
    """A score of some thousands has an error of 1e-4 in float32 before its weight is made."""
    case = Case(12, 64, 64, dtype)
    check(case, Form(30.0), slack=2e-3)
    case.keys -= 3
    check(case, Form(30.0), slack=2e-3)


def test_weights_of_a_long_context_add_up_to_one(bfloat16_is: str) -> None:
    """Sums go on from block to block: what each would lose would add up as well."""
    count, start = 32, 131_040
    keys = torch.randn(start + count, 1, 16, generator=torch.Generator().manual_seed(0))
    q, out = torch.randn(1, count, 16, generator=torch.Generator().manual_seed(1)), torch.empty(count, 1, 16)
    runs = PrefillRuns([(0, count, start, torch.arange(start + count))])
    runs.attend(q, keys, torch.ones_like(keys), FORMS["plain"], out)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_in_its_run(dtype: torch.dtype, bfloat16_is: str) -> None:
    """And is not lost there: whoever looks at it gets no number."""
    case = Case(4, 64, 64, dtype)
    clean = case.attend(FORMS["plain"])
    begin, end, start, slots = case.runs[4]
    slots[start + 8] = NUM_SLOTS - 1
    out = case.attend(FORMS["plain"])
    assert out[begin + 8 : end].isnan().all()
    out[begin + 8 : end] = clean[begin + 8 : end]
    out[begin : begin + 8], clean[begin : begin + 8] = 0, 0  # in tiles, weights of zero do not take the harm out of it
    assert same(out, clean)


def test_kernel_is_for_cpus_types_and_widths_it_knows() -> None:
    assert is_available(torch.bfloat16, CPU, WIDEST, WIDEST)
    assert not is_available(torch.float32, CPU, 64, WIDEST + 1)
    assert not is_available(torch.float16, CPU, 64, 64)
    assert not is_available(torch.float32, torch.device("cuda"), 64, 64)


def test_widest_keys_and_values(threads: int, bfloat16_is: str) -> None:
    check(Case(1, WIDEST, WIDEST, torch.bfloat16), Form(WIDEST**-0.5))


def test_what_does_not_fit_is_refused() -> None:
    case = Case(4, 64, 64, torch.bfloat16)
    with pytest.raises(ValueError, match=r"q is torch\.float32, the cache torch\.bfloat16"):
        PrefillRuns(case.runs).attend(case.q.float(), case.keys, case.values, FORMS["plain"], case.q)
    with pytest.raises(ValueError, match=r"scores are scaled by -1"):
        PrefillRuns(case.runs).attend(case.q, case.keys, case.values, Form(-1.0), case.q)
    with pytest.raises(ValueError, match=r"slots of 4 \+ 2 positions are \[5\], torch\.int64"):
        PrefillRuns([(0, 2, 4, torch.arange(5))])
    with pytest.raises(ValueError, match=r"torch\.int32"):
        PrefillRuns([(0, 2, 3, torch.arange(5, dtype=torch.int32))])
