"""The torch forms of attention against the formula, with heads in groups and masks."""

from __future__ import annotations

import pytest
import torch

from loraplex.kernels.attention.paged import Form, attend, attend_decode, attend_reference, causal_mask

PLAIN = Form(0.3)


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 4])
def test_attend_equals_the_formula(key_heads: int, window: int | None) -> None:
    q, k, v = torch.randn(2, 6, 5, 24), torch.randn(2, key_heads, 12, 24), torch.randn(2, key_heads, 12, 16)
    mask = causal_mask(7, 5, window, q.device)
    torch.testing.assert_close(attend(q, k, v, mask, PLAIN), attend_reference(q, k, v, mask, PLAIN))


@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_attend_decode_equals_the_formula(key_heads: int) -> None:
    q, k, v = torch.randn(3, 6, 24), torch.randn(3, 12, key_heads, 24), torch.randn(3, 12, key_heads, 16)
    mask = torch.arange(12)[None] < torch.tensor([[12], [1], [5]])
    expected = attend_reference(q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), mask[:, None, None], PLAIN)
    torch.testing.assert_close(attend_decode(q, k, v, mask, PLAIN), expected[:, :, 0])


def test_formula_is_softmax_with_a_cap_and_a_sink() -> None:
    """By hand: two keys of scores 1 and 0, capped, beside a sink of 0.5."""
    q, k, v = (
        torch.ones(1, 1, 1, 1),
        torch.tensor([1.0, 0.0]).view(1, 1, 2, 1),
        torch.tensor([3.0, 5.0]).view(1, 1, 2, 1),
    )
    form = Form(1.0, softcap=2.0, sinks=torch.tensor([0.5]))
    first, second, sink = torch.exp(torch.tensor([2 * torch.tanh(torch.tensor(0.5)), 0.0, 0.5]))
    expected = (3 * first + 5 * second) / (first + second + sink)
    torch.testing.assert_close(attend(q, k, v, None, form).view(()), expected)
