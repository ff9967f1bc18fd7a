"""Attention of one new token a sequence over its paged cache, the cache split among many programs.

The formula is that of `paged.py`. A long context is cut into splits that are attended to at the same time, each with
a softmax of its own; their results are then weighed by what each softmax was divided by:

    m[s] = max_{j in s} score[j]      l[s] = Σ_{j in s} exp(score[j] − m[s])
    o[s] = Σ_{j in s} exp(score[j] − m[s]) · v[j]
    out  = Σ_s exp(m[s] − M) · o[s] / (Σ_s exp(m[s] − M) · l[s] + exp(sink − M))      M = max over m and the sink

    q: Shape [B, H, D].   keys: Shape [S, Hk, D].   values: Shape [S, Hk, Dv].
    block_tables: Shape [B, W], int32. Position j of sequence b is row block_tables[b, j // size] · size + j % size.
    lengths: Shape [B], int64: positions to look at, the token's own included; 0 for a row that pads.
    out: Shape [B, H, Dv]; zeros where the length is 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.attention.paged import Form, attend, causal_mask
from loraplex.kernels.triton_support import padded, upcasts

BLOCK_SPLITS = 16  # what is combined at a time: were it all of them, each number of splits would compile a kernel


def attend_paged_decode(
    q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, lengths: Tensor, block_size: int, form: Form,
    num_splits: int = 8,
) -> Tensor:  # fmt: skip
    """The result, in the type of q."""
    batch, heads, width = q.shape
    key_heads, value_width = keys.shape[1], values.shape[2]
    partial = torch.empty((batch, heads, num_splits, value_width), dtype=torch.float32, device=q.device)
    maxima = torch.empty((batch, heads, num_splits), dtype=torch.float32, device=q.device)
    totals = torch.empty_like(maxima)
    out = torch.empty((batch, heads, value_width), dtype=q.dtype, device=q.device)
    _attend_split[(batch, key_heads, num_splits)](
        partial, maxima, totals, q, keys, values, block_tables, lengths, form.scale,
        form.window or 0, form.softcap or 0.0, heads, key_heads, width, value_width, num_splits,
        block_size, block_tables.stride(0), q.stride(0), q.stride(1), keys.stride(0), keys.stride(1),
        values.stride(0), values.stride(1),
        HAS_CAP=form.softcap is not None, GROUP=heads // key_heads,
        BLOCK_GROUP=padded(heads // key_heads), BLOCK_KEYS=_block_keys(max(width, value_width)),
        BLOCK_WIDTH=padded(width), BLOCK_VALUE=padded(value_width), UPCAST=upcasts(q, keys),
    )  # fmt: skip
    _combine[(batch, heads)](
        out, partial, maxima, totals, form.sinks if form.sinks is not None else maxima, heads, value_width, num_splits,
        HAS_SINKS=form.sinks is not None, BLOCK_SPLITS=BLOCK_SPLITS, BLOCK_VALUE=padded(value_width),
    )  # fmt: skip
    return out


def _block_keys(width: int) -> int:
    """What fits in 99 KiB of shared memory with the keys and values that are on their way, in float32 as well."""
    return 32 if width <= 256 else 16


@triton.jit(
    do_not_specialize=("window", "num_splits", "table_stride"),
    do_not_specialize_on_alignment=("block_tables", "lengths"),
)
def _attend_split(  # type: ignore[no-untyped-def]
    partial, maxima, totals, q, keys, values, block_tables, lengths, scale, window, softcap, heads, key_heads, width,
    value_width, num_splits, block_size, table_stride, q_batch, q_head, k_row, k_head, v_row, v_head,
    HAS_CAP: tl.constexpr, GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    batch, key_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + batch).to(tl.int32)
    oldest = tl.maximum(length - window, 0) if window > 0 else length * 0
    part = tl.cdiv(tl.cdiv(length - oldest, num_splits), BLOCK_KEYS) * BLOCK_KEYS
    first = oldest + split * part
    last = tl.minimum(first + part, length)
    members = tl.arange(0, BLOCK_GROUP)
    is_member = members < GROUP
    numbers, value_numbers = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_VALUE)
    query = tl.load(
        q + batch.to(tl.int64) * q_batch + (key_head * GROUP + members)[:, None] * q_head + numbers[None, :],
        mask=is_member[:, None] & (numbers < width)[None, :], other=0.0,
    )  # fmt: skip
    most = tl.full((BLOCK_GROUP,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_GROUP,), dtype=tl.float32)
    result = tl.zeros((BLOCK_GROUP, BLOCK_VALUE), dtype=tl.float32)
    for begin in range(first, last, BLOCK_KEYS):
        positions = begin + tl.arange(0, BLOCK_KEYS)
        is_key = positions < last
        blocks = tl.load(block_tables + batch * table_stride + positions // block_size, mask=is_key, other=0)
        rows = blocks.to(tl.int64) * block_size + positions % block_size
        key = tl.load(
            keys + rows[None, :] * k_row + key_head * k_head + numbers[:, None],
            mask=is_key[None, :] & (numbers < width)[:, None], other=0.0,
        )  # fmt: skip
        if UPCAST:
            scores = tl.dot(query.to(tl.float32), key.to(tl.float32), input_precision="ieee") * scale
        else:
            scores = tl.dot(query, key) * scale
        if HAS_CAP:
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_most = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_most[:, None])
        shrunk = tl.exp(most - new_most)
        value = tl.load(
            values + rows[:, None] * v_row + key_head * v_head + value_numbers[None, :],
            mask=is_key[:, None] & (value_numbers < value_width)[None, :], other=0.0,
        )  # fmt: skip
        total = total * shrunk + tl.sum(weights, axis=1)
        if UPCAST:
            result = result * shrunk[:, None] + tl.dot(weights, value.to(tl.float32), input_precision="ieee")
        else:
            result = result * shrunk[:, None] + tl.dot(weights.to(value.dtype), value)
        most = new_most
    place = (batch.to(tl.int64) * heads + key_head * GROUP + members) * num_splits + split
    tl.store(maxima + place, most, mask=is_member)
    tl.store(totals + place, total, mask=is_member)
    tl.store(
        partial + place[:, None] * value_width + value_numbers[None, :], result,
        mask=is_member[:, None] & (value_numbers < value_width)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=("num_splits",))
def _combine(  # type: ignore[no-untyped-def]
    out, partial, maxima, totals, sinks, heads, value_width, num_splits,
    HAS_SINKS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    numbers = tl.arange(0, BLOCK_VALUE)
    is_number = numbers < value_width
    overall = tl.full((1,), float("-inf"), dtype=tl.float32)
    divisor = tl.zeros((1,), dtype=tl.float32)
    if HAS_SINKS:
        overall = tl.zeros((1,), dtype=tl.float32) + tl.load(sinks + tl.program_id(1)).to(tl.float32)
        divisor += 1.0
    result = tl.zeros((BLOCK_VALUE,), dtype=tl.float32)
    for begin in range(0, num_splits, BLOCK_SPLITS):
        splits = begin + tl.arange(0, BLOCK_SPLITS)
        is_split = splits < num_splits
        most = tl.load(maxima + row * num_splits + splits, mask=is_split, other=float("-inf"))
        total = tl.load(totals + row * num_splits + splits, mask=is_split, other=0.0)
        parts = tl.load(
            partial + (row * num_splits + splits)[:, None] * value_width + numbers[None, :],
            mask=is_split[:, None] & is_number[None, :], other=0.0,
        )  # fmt: skip
        new_overall = tl.maximum(overall, tl.max(most, axis=0))
        # a row that pads has looked at nothing: −inf − (−inf) would be no number
        finite = tl.where(new_overall == float("-inf"), 0.0, new_overall)
        weights, shrunk = tl.exp(most - finite), tl.exp(overall - finite)
        divisor = divisor * shrunk + tl.sum(weights * total, axis=0)
        result = result * shrunk + tl.sum(parts * weights[:, None], axis=0)
        overall = new_overall
    result = result / tl.where(divisor == 0.0, 1.0, divisor)
    tl.store(out + row * value_width + numbers, result.to(out.dtype.element_ty), mask=is_number)


def attend_paged_decode_reference(
    q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, lengths: Tensor, block_size: int, form: Form
) -> Tensor:
    """The formula, sequence by sequence."""
    out = q.new_zeros((q.shape[0], q.shape[1], values.shape[2]))
    for row, length in enumerate(lengths.tolist()):
        if length:
            positions = torch.arange(length, device=q.device)
            slots = block_tables[row, positions // block_size].long() * block_size + positions % block_size
            k, v = (cache[slots].transpose(0, 1)[None] for cache in (keys, values))
            mask = causal_mask(length - 1, 1, form.window, q.device)
            out[row] = attend(q[row][None, :, None], k, v, mask, form)[0, :, 0]
    return out
