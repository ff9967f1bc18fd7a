"""The logits behind a step's segments -> what each gives: tokens, log-probabilities of its prompt, or its own error."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from loraplex.engines.errors import EngineError, InvalidRequest
from loraplex.engines.native.batch import Outcome, Sampled, Segment
from loraplex.engines.native.controls import controls_of
from loraplex.engines.native.sampler import Pick, Row, describe, sample, uniform
from loraplex.engines.protocol import SamplingParams, TokenLogprobs


def outcomes_of(segments: Sequence[Segment], logits: Tensor, pick: Pick) -> list[Outcome]:
    """logits: Shape [N, V], the `rows` of each segment."""
    scores: Iterator[TokenLogprobs] = iter(())
    if any(segment.scored for segment in segments):
        scores, logits = _scores(segments, logits)
    rows = [row for segment in segments if segment.samples for row in _rows(segment)]
    tokens, outcomes, end = sample(logits, rows, pick), [], 0
    for segment in segments:
        begin, end = end, end + segment.num_sampled
        outcomes.append(_outcome(tokens[begin:end], tuple(itertools.islice(scores, len(segment.scored)))))
    return outcomes


def _scores(segments: Sequence[Segment], logits: Tensor) -> tuple[Iterator[TokenLogprobs], Tensor]:
    """Of the tokens of prompts whose log-probabilities are wanted, one after another; and the logits of the others."""
    scored: list[int] = []
    sampled: list[int] = []
    end = 0
    for segment in segments:
        begin, end = end, end + len(segment.rows)
        scored += range(begin, end - segment.num_sampled)
        sampled += range(end - segment.num_sampled, end)
    wanted = [
        (segment.sequence.token_ids[position + 1], segment.sequence.request.sampling.num_prompt_logprobs or 0)
        for segment in segments for position in segment.scored
    ]  # fmt: skip
    return iter(describe(logits[scored], wanted)), logits[sampled]


def each_outcome(segments: Sequence[Segment], logits: Tensor, pick: Pick) -> list[Outcome]:
    """As `outcomes_of`, each segment by itself."""
    parts: tuple[Tensor, ...] = torch.split(logits, [len(segment.rows) for segment in segments])
    return [outcome for segment, part in zip(segments, parts, strict=True)
            for outcome in outcomes_of([segment], part, pick)]  # fmt: skip


def _outcome(tokens: list[Sampled | EngineError], scores: tuple[TokenLogprobs, ...]) -> Outcome:
    """An error behind a token that was sampled well is told by the next step, if it gets there."""
    sampled = tuple(itertools.takewhile(lambda token: isinstance(token, Sampled), tokens))
    if tokens and not sampled and isinstance(tokens[0], EngineError):
        return Outcome(error=tokens[0])
    return Outcome(sampled=sampled, prompt_logprobs=scores)  # type: ignore[arg-type]


def _rows(segment: Segment) -> list[Row]:
    """What the sampler needs to know of one sequence: behind its newest token, and behind each of its drafts."""
    constraint = segment.sequence.constraint
    if constraint is None:
        return [_row(segment, place) for place in range(segment.num_sampled)]
    try:
        masks = constraint.masks(segment.drafts)
    except InvalidRequest as error:
        return [Row(SamplingParams(max_tokens=1, temperature=0.0), failure=error)] * segment.num_sampled
    return [_row(segment, place, mask) for place, mask in enumerate(masks)]


def _row(segment: Segment, place: int, mask: bytes | None = None) -> Row:
    """Behind so many of its drafts."""
    sequence, drafts = segment.sequence, segment.drafts[:place]
    sampling = sequence.request.sampling
    num_generated = sequence.num_generated + place
    token_ids = [*sequence.token_ids, *drafts] if drafts else sequence.token_ids
    ends: frozenset[int] = frozenset()
    if num_generated < sampling.min_tokens:
        ends = sequence.end_token_ids
    elif sampling.ignore_eos and mask is not None:  # without a mask it ends nothing
        ends = sequence.eos_token_ids
    if mask is not None and ends and not _admits_other(mask, ends):
        ends = frozenset()  # a grammar's end is put off by nothing
    return Row(
        params=sampling,
        draw=uniform(sequence.seed, num_generated) if sampling.temperature > 0 else 0.0,
        banned=ends.union(controls_of(sampling).completing(token_ids)) if sampling.bad_words_ids else ends,
        token_ids=token_ids,
        output_counts=sequence.output_counts + Counter(drafts) if drafts else sequence.output_counts,
        mask=mask,
    )


def _admits_other(mask: bytes, token_ids: Iterable[int]) -> bool:
    """Whether a mask has a bit of any other token."""
    return bool(int.from_bytes(mask, "little") & ~sum(1 << token_id for token_id in token_ids))
