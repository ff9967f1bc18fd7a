"""The rotary embedding by Triton against its formula, and against transformers' function to the last bit."""

from __future__ import annotations

import pytest
import torch
from support.mixes import DEVICE
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from loraplex.kernels.attention.rotary import rotate, rotate_reference, takes
from loraplex.kernels.triton_support import IS_INTERPRETED

SHAPES = [(1, 9, 3, 64), (8, 32, 4, 128), (5, 3, 1, 6), (0, 2, 1, 8), (40, 9, 9, 62)]  # tokens, heads, key heads, width
# Three roundings of products and sums whose terms may take each other away. Triton's interpreter cuts bfloat16 off.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2**-8, torch.bfloat16: 2**-4}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rotary_equals_the_formula_and_transformers(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tokens, heads, key_heads, width = shape
    generator = torch.Generator().manual_seed(tokens)
    q, k = (
        torch.randn(1, tokens, count, width, generator=generator).to(dtype).to(DEVICE).transpose(1, 2)
        for count in (heads, key_heads)
    )
    angles = torch.randn(1, tokens, width, generator=generator)
    cos, sin = angles.cos().to(dtype).to(DEVICE), angles.sin().to(dtype).to(DEVICE)
    assert takes(q, k, cos, sin)
    rotated = rotate(q, k, cos, sin)
    for x, y, theirs in zip((q, k), rotated, apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(y.double(), rotate_reference(x, cos, sin), rtol=0, atol=TOLERANCES[dtype])
        assert torch.equal(y, theirs) or (IS_INTERPRETED and dtype == torch.bfloat16)


def test_heads_may_lie_anywhere() -> None:
    """Within one tensor for q, k and v, or each head's tokens together."""
    fused = torch.randn(1, 6, 7, 16, device=DEVICE)
    angles = torch.randn(1, 7, 16, device=DEVICE)
    inside = rotate(fused[:, :4], fused[:, 4:], angles.cos(), angles.sin())
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (fused[:, :4], fused[:, 4:]))
    assert all(map(torch.equal, inside, rotate(q, k, angles.cos(), angles.sin())))


def test_what_is_not_a_number_stays_in_its_token() -> None:
    q, k = torch.randn(1, 2, 4, 8, device=DEVICE), torch.randn(1, 1, 4, 8, device=DEVICE)
    q[0, 1, 2, 3] = float("nan")
    ones = torch.ones(1, 4, 8, device=DEVICE)
    rotated_q, rotated_k = rotate(q, k, ones, ones)
    assert rotated_q.isnan().any(-1).nonzero().tolist() == [[0, 1, 2]]
    assert torch.isfinite(rotated_k).all()
