"""The rotary embedding in C against the formula, and against transformers' function to the last bit."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from loraplex.kernels.attention.cpu_rotary import is_available, rotate, takes
from loraplex.kernels.attention.rotary import rotate_reference

CPU = torch.device("cpu")
SHAPES = [(1, 9, 3, 64), (8, 32, 4, 64), (5, 3, 1, 6), (0, 2, 1, 8), (300, 9, 3, 62)]  # tokens, heads, key heads, width
# float32: three roundings of 2^-24; bfloat16: of 2^-9, of products and sums whose terms may take each other away
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-5}

pytestmark = pytest.mark.skipif(not is_available(torch.float32, CPU), reason="the kernel was not built: no compiler")

Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def arguments(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Arguments:
    """q, k, cos, sin, as a model has them: heads lie together by token."""
    tokens, heads, key_heads, width = shape
    generator = torch.Generator().manual_seed(tokens)
    q, k = (torch.randn(1, tokens, count, width, generator=generator).to(dtype) for count in (heads, key_heads))
    angles = torch.randn(1, tokens, width, generator=generator)
    return q.transpose(1, 2), k.transpose(1, 2), angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rotary_equals_the_formula_and_transformers(
    shape: tuple[int, int, int, int], dtype: torch.dtype, threads: int
) -> None:
    q, k, cos, sin = arguments(shape, dtype)
    assert takes(q, k, cos, sin)
    rotated = rotate(q, k, cos, sin)
    for x, y, theirs in zip((q, k), rotated, apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(y.double(), rotate_reference(x, cos, sin), rtol=0, atol=TOLERANCES[dtype])
        assert torch.equal(y, theirs)


def test_heads_may_lie_anywhere() -> None:
    """Within one tensor for q, k and v, or each head's tokens together."""
    q, k, cos, sin = arguments((7, 4, 2, 16), torch.float32)
    fused = torch.cat((q, k), dim=1).contiguous()
    inside = rotate(fused[:, :4], fused[:, 4:], cos, sin)
    assert all(map(torch.equal, inside, rotate(q, k, cos, sin)))


def test_what_is_not_a_number_stays_in_its_token() -> None:
    q, k, cos, sin = arguments((4, 2, 1, 8), torch.bfloat16)
    q[0, 1, 2, 3] = float("nan")
    rotated, _ = rotate(q, k, cos, sin)
    assert rotated.isnan().any(-1).nonzero().tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    "other",
    [
        lambda q, k, cos, sin: (q, k, cos[..., :4], sin[..., :4]),  # a part of each head is turned
        lambda q, k, cos, sin: (q.half(), k.half(), cos.half(), sin.half()),
        lambda q, k, cos, sin: (q, k, cos.float(), sin.float()),
        lambda q, k, cos, sin: (q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), cos, sin),
        lambda q, k, cos, sin: (q[:, :, :2], k[:, :, :2], cos, sin),
        lambda q, k, cos, sin: (q.transpose(2, 3).contiguous().transpose(2, 3), k, cos, sin),
    ],
    ids=["partial", "half", "wide cos", "batch", "fewer tokens", "strided"],
)
def test_what_it_does_not_take_is_told(other: object) -> None:
    assert callable(other)
    assert takes(*arguments((4, 2, 1, 8), torch.bfloat16))
    assert not takes(*other(*arguments((4, 2, 1, 8), torch.bfloat16)))


def test_kernel_is_for_cpus_and_types_it_knows() -> None:
    assert not is_available(torch.float16, CPU)
    assert not is_available(torch.float32, torch.device("cuda"))
