"""Logits of a step -> one token a row, in one batched computation.

Each row draws with one uniform number by inversion, and that number depends on the request's seed and on how many
tokens it has generated, on nothing else: the same seed and request give the same draws whatever shares the batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.engines.errors import EngineError, GenerationFailed
from loraplex.engines.protocol import SamplingParams


def uniform(seed: int, num_generated: int) -> float:
    """The draw for a request's next token, in [0, 1)."""
    return random.Random(f"{seed}:{num_generated}").random()


def sample(
    logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float], banned: Sequence[Sequence[int]]
) -> list[int | EngineError]:
    """logits: Shape [N, V]. `banned[i]` are tokens row i must not take now. A row of NaN is that row's error alone."""
    for row, row_banned in enumerate(banned):
        if row_banned:
            logits[row, list(row_banned)] = float("-inf")
    best, tokens = logits.max(dim=-1)
    is_finite = torch.isfinite(best).tolist()
    chosen = tokens.tolist()
    drawn = [row for row, row_params in enumerate(params) if row_params.temperature > 0 and is_finite[row]]
    if drawn:
        picked = _draw(logits[drawn].float(), [params[row] for row in drawn], [draws[row] for row in drawn])
        for row, token in zip(drawn, picked, strict=True):
            chosen[row] = token
    return [
        token if finite else GenerationFailed("the model's output is not finite for this request")
        for token, finite in zip(chosen, is_finite, strict=True)
    ]


def _draw(logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> list[int]:
    """Inversion over the filtered distribution, most likely token first. logits: Shape [N, V], float32."""
    device = logits.device
    temperature = torch.tensor([p.temperature for p in params], device=device)[:, None]
    probs, order = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
    size = probs.shape[-1]
    top_k = torch.tensor([p.top_k or size for p in params], device=device)[:, None]
    probs = probs.masked_fill(torch.arange(size, device=device)[None, :] >= top_k, 0.0)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    top_p = torch.tensor([p.top_p for p in params], device=device)[:, None]
    before = probs.cumsum(dim=-1) - probs
    probs = probs.masked_fill((before >= top_p) & (top_p < 1.0), 0.0)
    min_p = torch.tensor([p.min_p for p in params], device=device)[:, None]
    probs = probs.masked_fill(probs < min_p * probs[:, :1], 0.0)
    cumulative = probs.double().cumsum(dim=-1)
    target = torch.tensor(draws, dtype=torch.float64, device=device)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).clamp_(max=size - 1)
    return [int(token) for token in order.gather(1, index)[:, 0].tolist()]
