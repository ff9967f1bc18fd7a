"""Logits of a step -> one token a row, in one batched computation.

Each row draws with one uniform number by inversion, and that number depends on the request's seed and on how many
tokens it has generated, on nothing else: the same seed and request give the same draws whatever shares the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from hashlib import blake2b

import msgspec
import numpy as np
import torch
from torch import Tensor

from loraplex.engines.errors import EngineError, GenerationFailed, InvalidRequest
from loraplex.engines.native.batch import Sampled
from loraplex.engines.native.controls import controls_of
from loraplex.engines.protocol import SamplingParams, TokenLogprobs


class Row(msgspec.Struct, frozen=True):
    """One sequence's part: its controls, its draw, what it must not take now, and the tokens it has so far.

    `mask`, where there is one, has a bit for each token id, lowest first: others are not admitted. With a `failure`
    nothing is sampled.
    """

    params: SamplingParams
    draw: float = 0.0
    banned: Set[int] = frozenset()
    token_ids: Sequence[int] = ()
    output_counts: Mapping[int, int] | None = None
    mask: bytes | None = None
    failure: EngineError | None = None


# (logits, those of rows whose temperature is not 0) -> a token a row. Logits: Shape [N, V], float32.
Draw = Callable[[Tensor, Sequence[Row]], list[int]]

# (logits, rows) -> each row's largest logit, NaN where there is any, and its token, which is none where that is not
# finite: the likeliest where its temperature is 0, else one that is drawn. Logits: Shape [N, V].
Pick = Callable[[Tensor, Sequence[Row]], tuple[list[float], list[int]]]


def uniform(seed: int, num_generated: int) -> float:
    """The draw for a request's next token, in [0, 1)."""
    digest = blake2b(b"%d:%d" % (seed, num_generated), digest_size=7).digest()
    return (int.from_bytes(digest) >> 3) * 2.0**-53


def picking(draw: Draw) -> Pick:
    """A `Pick` on any device: torch finds the largest logits, `draw` the tokens of the rows that are drawn."""

    def pick(logits: Tensor, rows: Sequence[Row]) -> tuple[list[float], list[int]]:
        best, tokens = logits.max(dim=-1)
        largest, chosen = best.tolist(), tokens.tolist()
        drawn = [
            index for index, row in enumerate(rows) if row.params.temperature > 0 and math.isfinite(largest[index])
        ]
        if drawn:
            picked = draw(logits[drawn].float(), [rows[index] for index in drawn])
            for index, token in zip(drawn, picked, strict=True):
                chosen[index] = token
        return largest, chosen

    return pick


def sample(logits: Tensor, rows: Sequence[Row], pick: Pick) -> list[Sampled | EngineError]:
    """logits: Shape [N, V], may be changed in place. A row that is not finite is that row's error alone."""
    if not rows:
        return []
    asking = [index for index, row in enumerate(rows) if row.params.num_logprobs is not None]
    untouched = logits[asking] if asking else None
    controlled = [index for index, row in enumerate(rows) if _is_controlled(row)]
    if controlled:
        logits = logits.float()  # in bfloat16 a penalty of 0.1 is less than half a step at 32: nothing would change
    for index in controlled:
        _control(logits[index], rows[index])
    _admit(logits, rows)
    largest, chosen = pick(logits, rows)
    logprobs: dict[int, TokenLogprobs] = {}
    if untouched is not None:
        wanted = [(chosen[index], rows[index].params.num_logprobs or 0) for index in asking]
        logprobs = dict(zip(asking, describe(untouched, wanted), strict=True))
    return [
        row.failure or (Sampled(token, logprobs.get(index)) if math.isfinite(value) else _failure(value, row))
        for index, (row, token, value) in enumerate(zip(rows, chosen, largest, strict=True))
    ]


def _failure(best: float, row: Row) -> EngineError:
    if best == -math.inf and (row.mask is not None or row.params.allowed_token_ids or row.banned):
        field = None if row.mask is None else "grammar"
        return InvalidRequest("nothing can follow: what the request admits and excludes leaves no token", field)
    return GenerationFailed("the model's output is not finite for this request")


def _is_controlled(row: Row) -> bool:
    params = row.params
    return bool(
        params.repetition_penalty != 1.0
        or (row.output_counts and (params.presence_penalty or params.frequency_penalty))
        or params.logit_bias
        or params.allowed_token_ids
        or row.banned
    )


def _control(logits: Tensor, row: Row) -> None:
    """Penalties, biases and bans of one row, in place. logits: Shape [V], float32."""
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.array(row.token_ids)).to(logits.device)  # what is written twice is the same
        scores = logits[seen]
        logits[seen] = torch.where(scores < 0, scores * params.repetition_penalty, scores / params.repetition_penalty)
    if row.output_counts and (params.presence_penalty or params.frequency_penalty):
        seen = torch.tensor(list(row.output_counts), device=logits.device)
        counts = torch.tensor(list(row.output_counts.values()), device=logits.device, dtype=logits.dtype)
        logits[seen] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        biased, values = controls_of(params).bias(logits)
        logits[biased] += values
    if params.allowed_token_ids:
        logits.masked_fill_(controls_of(params).others(logits), float("-inf"))
    if row.banned:
        logits[torch.tensor(sorted(row.banned), device=logits.device)] = float("-inf")


def _admit(logits: Tensor, rows: Sequence[Row]) -> None:
    """Leave each row what its mask admits, in place. logits: Shape [N, V]."""
    masked = [index for index, row in enumerate(rows) if row.mask is not None]
    if not masked:
        return
    packed = np.frombuffer(b"".join(row.mask for row in rows if row.mask is not None), dtype=np.uint8)
    bits = np.unpackbits(packed.reshape(len(masked), -1), axis=1, count=logits.shape[1], bitorder="little")
    admitted = torch.from_numpy(bits).to(logits.device).bool()
    logits[masked] = logits[masked].masked_fill_(~admitted, float("-inf"))


def describe(logits: Tensor, wanted: Sequence[tuple[int, int]]) -> list[TokenLogprobs]:
    """Of each row the log-probability of a token, and of that many likeliest ones; `wanted` has a pair a row.

    logits: Shape [N, V], as the model gave them.
    """
    table = torch.log_softmax(logits.float(), dim=-1)
    values, tokens = table.topk(max((count for _, count in wanted), default=0), dim=-1)
    taken = table.gather(1, torch.tensor([token for token, _ in wanted], device=table.device)[:, None])
    return [
        TokenLogprobs(logprob, tuple(zip(tokens[place, :count].tolist(), values[place, :count].tolist(), strict=True)))
        for place, ([logprob], (_, count)) in enumerate(zip(taken.tolist(), wanted, strict=True))
    ]


def draw_by_sorting(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """Inversion over the filtered distribution, most likely token first. logits: Shape [N, V], float32."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    params = [row.params for row in rows]
    probs, order = torch.softmax(logits / column([p.temperature for p in params]), dim=-1).sort(
        dim=-1, descending=True, stable=True
    )
    size = probs.shape[-1]
    ranks = torch.arange(size, device=logits.device)[None, :]
    probs = probs.masked_fill(ranks >= column([p.top_k or size for p in params]), 0.0)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    top_p = column([p.top_p for p in params])
    before = probs.cumsum(dim=-1) - probs
    probs = probs.masked_fill((before >= top_p) & (top_p < 1.0), 0.0)
    probs = probs.masked_fill(probs < column([p.min_p for p in params]) * probs[:, :1], 0.0)
    if any(p.typical_p < 1.0 for p in params):
        probs = _keep_typical(probs, column([p.typical_p for p in params]))
    cumulative = probs.double().cumsum(dim=-1)
    target = torch.tensor([row.draw for row in rows], dtype=torch.float64, device=logits.device)[:, None]
    index = torch.searchsorted(cumulative, target * cumulative[:, -1:], right=True).clamp_(max=size - 1)
    return [int(token) for token in order.gather(1, index)[:, 0].tolist()]


def _keep_typical(probs: Tensor, mass: Tensor) -> Tensor:
    """Locally typical sampling (arXiv 2202.00666): the tokens whose surprise is nearest the expected one.

    probs: Shape [N, V]. mass: Shape [N, 1], how much probability to keep at least.
    """
    probs = probs / probs.sum(dim=-1, keepdim=True)
    surprise = -probs.log()
    entropy = (probs * surprise).nan_to_num().sum(dim=-1, keepdim=True)
    order = (surprise - entropy).abs().argsort(dim=-1, stable=True)
    ordered = probs.gather(1, order)
    dropped = (ordered.cumsum(dim=-1) - ordered >= mass) & (mass < 1.0)
    return probs.masked_fill(torch.zeros_like(dropped).scatter_(1, order, dropped), 0.0)


pick_by_sorting = picking(draw_by_sorting)
