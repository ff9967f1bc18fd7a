"""What ends an answer beside its stop strings: the base's ends of sequence, its adapter's own, tokens that it names."""

from __future__ import annotations

from collections.abc import Set

import msgspec

from loraplex.engines.protocol import GenerateRequest, SamplingParams


def with_own_ends(request: GenerateRequest, own_ends: Set[int]) -> GenerateRequest:
    """The request, ended by the end-of-sequence tokens of its adapter's tokenizer too."""
    if not own_ends:
        return request
    sampling = msgspec.structs.replace(request.sampling, end_token_ids=tuple(sorted(own_ends)))
    return msgspec.structs.replace(request, sampling=sampling)


def all_ends(sampling: SamplingParams, eos_token_ids: Set[int]) -> frozenset[int]:
    """Every token that may end the answer; `eos_token_ids` are the base's."""
    return frozenset(eos_token_ids).union(sampling.stop_token_ids, sampling.end_token_ids)


def named_ends(sampling: SamplingParams, eos_token_ids: Set[int]) -> frozenset[int]:
    """The stop tokens that the request names; an end of sequence is one only where it ends nothing by itself."""
    named = frozenset(sampling.stop_token_ids)
    return named if sampling.ignore_eos else named - {*eos_token_ids, *sampling.end_token_ids}
