"""Attention of new tokens over keys and values that lie scattered in a paged cache, in torch.

For a query token at position p of its sequence, with query head h on key head h // (H / Hk):

    out[h] = Σ_{j ≤ p, p − j < window} softmax_j(cap(scale · q[h] · k[slot(j)])) · v[slot(j)]

where `cap(s) = softcap · tanh(s / softcap)` if the model caps, and a sink adds exp(sink[h]) to the softmax's
denominator if the model has sinks. `slot(j)` is the cache row of position j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Form:
    """What a layer asks for beyond plain softmax attention. `sinks`: Shape [H]."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's own attention computes it."""
        return self.softcap is None and self.sinks is None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, form: Form) -> Tensor:
    """Attention of B sequences at once.

    q: Shape [B, H, N, D]. k: Shape [B, Hk, L, D]. v: Shape [B, Hk, L, Dv]. mask: Shape [B or 1, 1, N, L], bool, True
    where a query may look; None: everywhere. Of a plain form it may be what is added to scores, of q's type, which
    torch would make of it in every call. Result: Shape [B, H, N, Dv].
    """
    if not form.is_plain:
        return attend_reference(q, k, v, mask, form)
    grouped = q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=form.scale, enable_gqa=grouped)


def attend_chunk(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, mask: Tensor | None, form: Form) -> Tensor:
    """Attention of one sequence's tokens over the cache rows of all its positions, which are gathered.

    q: Shape [1, H, N, D]. keys: Shape [S, Hk, D]. values: Shape [S, Hk, Dv]. slots: Shape [L]. mask: as of `attend`.
    Result: Shape [1, H, N, Dv].
    """
    k, v = (cache.index_select(0, slots).transpose(0, 1)[None] for cache in (keys, values))
    return attend(q, k, v, mask, form)


def attend_decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, form: Form) -> Tensor:
    """One query a sequence: the heads that share a key head become its queries, so that nothing is repeated.

    q: Shape [B, H, D]. k: Shape [B, L, Hk, D]. v: Shape [B, L, Hk, Dv]. mask: Shape [B, L], bool. Result: [B, H, Dv].
    """
    batch, heads, width = q.shape
    key_heads = k.shape[2]
    if not form.is_plain:
        out = attend_reference(q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), mask[:, None, None], form)
        return out[:, :, 0]
    out = functional.scaled_dot_product_attention(
        q.view(batch, key_heads, heads // key_heads, width),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask[:, None, None],
        scale=form.scale,
    )
    return out.reshape(batch, heads, v.shape[-1])


def attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, form: Form) -> Tensor:
    """The formula with caps and sinks, softmax in float32."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * form.scale
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if form.sinks is not None:
        sinks = form.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return weights.to(v.dtype) @ v


def chunk_mask(start: int, num_queries: int, form: Form, like: Tensor) -> Tensor:
    """As `causal_mask`, for `attend_chunk`: of a plain form what is added to scores, of the type of `like`."""
    mask = causal_mask(start, num_queries, form.window, like.device)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, float("-inf")) if form.is_plain else mask


def causal_mask(start: int, num_queries: int, window: int | None, device: torch.device) -> Tensor:
    """N queries from position `start` on, over the L = start + N keys so far. Shape [1, 1, N, L]."""
    queries = torch.arange(start, start + num_queries, device=device)[:, None]
    keys = torch.arange(start + num_queries, device=device)[None, :]
    mask = keys <= queries
    if window is not None:
        mask &= queries - keys < window
    return mask[None, None]
