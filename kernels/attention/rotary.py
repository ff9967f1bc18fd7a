"""Rotary position embedding of queries and keys in one launch, where torch's operations are a dozen.

For each head's numbers x of a token, whose first and second halves are turned against each other:

    y[i] = x[i] · cos[i] − x[i + D/2] · sin[i]    for i < D/2
    y[i] = x[i] · cos[i] + x[i − D/2] · sin[i]    for i ≥ D/2

Products and sums are rounded one by one, as torch's operations are. The form is that of GPT-NeoX and Llama
(Su et al., RoFormer, arXiv:2104.09864, with halves instead of neighbours turned against each other).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.triton_support import padded

BLOCK_HEADS = 8


def takes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` knows these shapes: one row of T tokens, whose heads are as wide as cos and sin."""
    *batch, num_tokens, width = cos.shape
    return (
        batch == [1]
        and width % 2 == 0
        and q.dim() == k.dim() == 4
        and q.shape[0] == k.shape[0] == 1
        and q.shape[2] == k.shape[2] == num_tokens
        and q.shape[3] == k.shape[3] == width
        and q.stride(3) == k.stride(3) == 1
        and sin.shape == cos.shape
        and q.dtype == k.dtype == cos.dtype == sin.dtype
    )


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The formula. q: Shape [1, H, T, D]. k: Shape [1, Hk, T, D]. cos, sin: Shape [1, T, D]. Result: as q and k.

    For what `takes` takes, and nothing else. The results are views of [1, T, H, D] and [1, T, Hk, D].
    """
    _, heads, num_tokens, width = q.shape
    key_heads = k.shape[1]
    cos, sin = cos.contiguous(), sin.contiguous()
    rotated_q, rotated_k = (x.new_empty(1, num_tokens, x.shape[1], width) for x in (q, k))
    programs = triton.cdiv(heads, BLOCK_HEADS) + triton.cdiv(key_heads, BLOCK_HEADS)
    if num_tokens:
        _rotate[(num_tokens, programs)](
            rotated_q, rotated_k, q, k, cos, sin, heads, key_heads, width // 2,
            q.stride(2), q.stride(1), k.stride(2), k.stride(1),
            BLOCK_HEADS=BLOCK_HEADS, BLOCK_HALF=padded(width // 2, 1), enable_fp_fusion=False,
        )  # fmt: skip
    return rotated_q.transpose(1, 2), rotated_k.transpose(1, 2)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    y_q, y_k, q, k, cos, sin, heads, key_heads, half, q_token, q_head, k_token, k_head,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_HEADS
    query_heads = tl.cdiv(heads, BLOCK_HEADS) * BLOCK_HEADS
    if first < query_heads:
        _turn(y_q, q, cos, sin, token, first, heads, half, q_token, q_head, BLOCK_HEADS, BLOCK_HALF)
    else:
        _turn(
            y_k, k, cos, sin, token, first - query_heads, key_heads, half, k_token, k_head, BLOCK_HEADS, BLOCK_HALF
        )  # fmt: skip


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    y, x, cos, sin, token, first, heads, half, by_token, by_head, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    numbers, own = tl.arange(0, BLOCK_HALF), first + tl.arange(0, BLOCK_HEADS)
    is_number = numbers < half
    mask = (own < heads)[:, None] & is_number[None, :]
    angles = token * 2 * half + numbers
    places = x + token * by_token + own[:, None] * by_head + numbers[None, :]
    results = y + token * heads * 2 * half + own[:, None] * 2 * half + numbers[None, :]
    low = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(places + half, mask=mask, other=0.0).to(tl.float32)
    for upper in tl.static_range(2):
        c = tl.load(cos + angles + upper * half, mask=is_number, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + angles + upper * half, mask=is_number, other=0.0).to(tl.float32)[None, :]
        straight = ((high if upper else low) * c).to(y.dtype.element_ty).to(tl.float32)
        turned = ((low if upper else -high) * s).to(y.dtype.element_ty).to(tl.float32)
        tl.store(results + upper * half, (straight + turned).to(y.dtype.element_ty), mask=mask)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula in float64. x: Shape [1, H, T, D]. cos, sin: Shape [1, T, D]. Result: as x."""
    low, high = x.double().chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    return x.double() * cos.double().unsqueeze(1) + turned * sin.double().unsqueeze(1)
