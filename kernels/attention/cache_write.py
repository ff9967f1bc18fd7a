"""Writing the keys and values of a step's tokens to their rows of the paged cache, both in one launch.

keys[slots[t], h] = key[h, t]    values[slots[t], h] = value[h, t]

key: Shape [Hk, T, D].   value: Shape [Hk, T, Dv].   slots: Shape [T], int64. No row twice but those of padding.
keys: Shape [S, Hk, D].   values: Shape [S, Hk, Dv]. Of the type of key and value; other rows are left as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.triton_support import padded


def write_paged(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Changes keys and values as above."""
    heads, num_tokens, width = key.shape
    value_width = value.shape[2]
    _write[(num_tokens, 2)](
        keys, values, key, value, slots, heads, width, value_width, *key.stride()[:2], *value.stride()[:2],
        BLOCK_HEADS=padded(heads, 1), BLOCK_WIDTH=padded(max(width, value_width), 1),
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=("slots",))
def _write(  # type: ignore[no-untyped-def]
    keys, values, key, value, slots, heads, width, value_width, k_head, k_token, v_head, v_token,
    BLOCK_HEADS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if tl.program_id(1) == 0:
        _copy(keys, key + token * k_token, slot, heads, width, k_head, BLOCK_HEADS, BLOCK_WIDTH)
    else:
        _copy(values, value + token * v_token, slot, heads, value_width, v_head, BLOCK_HEADS, BLOCK_WIDTH)


@triton.jit
def _copy(  # type: ignore[no-untyped-def]
    cache, numbers, slot, heads, width, by_head, BLOCK_HEADS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    own, places = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK_WIDTH)[None, :]
    mask = (own < heads) & (places < width)
    read = tl.load(numbers + own * by_head + places, mask=mask, other=0.0)
    tl.store(cache + (slot * heads + own) * width + places, read, mask=mask)


def write_paged_reference(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """The formula, token by token."""
    for token, slot in enumerate(slots.tolist()):
        keys[slot], values[slot] = key[:, token], value[:, token]
