"""The last question before a model is served: do our steps give what transformers alone gives?

Two short sequences are computed in chunks, side by side, over the paged cache, and compared with one plain forward
pass of each under transformers' own eager attention. Whatever an architecture does that we are not told of (positions
counted elsewhere, state between tokens, a bias on the scores) shows here, and the model is refused instead of served
wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.engines.errors import ModelNotServable
from loraplex.engines.native.batch import Batch, Segment
from loraplex.engines.native.model import Trial, ordinary_token_ids
from loraplex.engines.native.runner import Runner
from loraplex.engines.native.sequence import Sequence
from loraplex.engines.protocol import GenerateRequest, SamplingParams

# The chunks of each sequence, step by step: prefill beside prefill, prefill beside decode, decodes alone.
_CHUNKS = ((6, 3), (1, 5), (4, 1), (1, 1))
# Of the norm of a token's logits, at the median of the tokens: one flipped choice of experts is no error. In float32
# other orders of summation give about 1e-6; in half precision, or where a quantisation rounds activations, about 1e-2;
# what is wrong gives about 1.
_MAX_ERROR = 1e-3
_MAX_ERROR_ROUNDED = 0.2


def compare_with_reference(
    model: PreTrainedModel, trial: Trial, runner: Runner, block_size: int, num_blocks: int
) -> None:
    """Raises ModelNotServable where the difference is more than rounding. Leaves nothing in the cache that is used."""
    ids = ordinary_token_ids(model).repeat(2)[: sum(map(sum, _CHUNKS))].tolist()
    lengths = [sum(chunks[number] for chunks in _CHUNKS) for number in (0, 1)]
    needed = [-(-length // block_size) for length in lengths]
    if sum(needed) > num_blocks:
        return  # a cache this small is a test's
    sequences = [
        plain_sequence(ids[: lengths[0]], range(needed[0])),
        plain_sequence(ids[-lengths[1] :], range(needed[0], sum(needed))),
    ]
    try:
        errors = _errors(model, runner, sequences)
    except Exception as error:  # any failure of foreign model code means the same: it cannot be carried
        raise ModelNotServable(f"{type(model).__name__} cannot be stepped in chunks: {error!r}") from error
    is_exact = model.dtype == torch.float32 and getattr(model, "hf_quantizer", None) is None
    limit = _MAX_ERROR if is_exact else _MAX_ERROR_ROUNDED
    if float(errors.median()) <= limit:
        return
    kind = type(model).__name__
    if trial.stateful:
        raise ModelNotServable(
            f"{kind} is not served: layers {list(trial.stateful)} do not go through transformers' attention interface, "
            "so their state would be lost between steps"
        )
    raise ModelNotServable(
        f"{kind} is not served: computed in steps its logits differ from transformers' own by "
        f"{float(errors.median()):.1%}, so it keeps or counts something that this engine is not told of"
    )


def _errors(model: PreTrainedModel, runner: Runner, sequences: list[Sequence]) -> Tensor:
    """‖ours − theirs‖ / ‖theirs‖ at the end of each chunk."""
    expected = [_plain_logits(model, sequence.token_ids) for sequence in sequences]
    errors, starts = [], [0, 0]
    for step, chunks in enumerate(_CHUNKS):
        segments = tuple(
            Segment(sequence=sequence, start=start, num_tokens=chunk, samples=True)
            for sequence, start, chunk in zip(sequences, starts, chunks, strict=True)
        )
        starts = [start + chunk for start, chunk in zip(starts, chunks, strict=True)]
        logits = runner.logits(Batch(step=step, segments=segments)).float()
        for row, (ours, end) in enumerate(zip(logits, starts, strict=True)):
            theirs = expected[row][end - 1]
            errors.append(torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs))
    return torch.stack(errors)


@torch.inference_mode()
def _plain_logits(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """One forward pass without a cache under transformers' eager attention. Shape [T, V], float32."""
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        logits: Tensor = model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False).logits
    finally:
        model.set_attn_implementation(ours)
    return logits[0].float()


def plain_sequence(token_ids: list[int], blocks: range) -> Sequence:
    """A sequence of these tokens in these blocks, for trials."""
    request = GenerateRequest(
        request_id="", prompt_token_ids=tuple(token_ids), sampling=SamplingParams(max_tokens=1, temperature=0.0)
    )
    sequence = Sequence(request=request, seed=0, eos_token_ids=frozenset(), arrival=0.0, max_len=len(token_ids) + 1)
    sequence.block_table = list(blocks)
    return sequence
