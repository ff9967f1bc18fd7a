"""Batch -> one forward pass -> one token (or error) for each segment that samples.

Everything that touches tensors during a step is here or below; who is in the batch is not decided here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.engines.adapters.arena import Arena
from loraplex.engines.errors import EngineError
from loraplex.engines.native.attention import AttentionStep, Decodes, PagedAttention, Prefill
from loraplex.engines.native.batch import Batch, Sampled, Segment
from loraplex.engines.native.effects import Effects
from loraplex.engines.native.lora import LoraLayers, Owners
from loraplex.engines.native.model import Trial
from loraplex.engines.native.sampler import Row, sample, uniform
from loraplex.engines.native.sequence import Sequence as EngineSequence
from loraplex.engines.native.stopwatch import Stopwatch


class Runner:
    """Steps one model over one KV cache and one arena."""

    def __init__(
        self,
        model: PreTrainedModel,
        trial: Trial,
        attention: PagedAttention,
        arena: Arena,
        num_blocks: int,
        block_size: int,
    ) -> None:
        self._model = model
        self.stopwatch = Stopwatch()
        self._num_slots = num_blocks * block_size
        self._attention = attention
        self._block_size = block_size
        self._lora = LoraLayers(arena)
        self._selects = trial.selects
        for name, (layer, module) in trial.layers.items():
            self._lora.wrap(layer, module, behind_selection=trial.passages[name].selected)
        self._effects = Effects(model, trial, arena)

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Sampled | EngineError]:
        """One token, or its error, for each of `batch.sampling_segments`, in that order."""
        with self.stopwatch.phase("forward"):
            logits = self.logits(batch)
        with self.stopwatch.phase("sample"):
            return sample(logits, [_row(segment.sequence) for segment in batch.sampling_segments])

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """The forward pass: the logits behind each of `batch.sampling_segments`. Shape [N, V]."""
        device = self._model.device
        segments = batch.segments
        positions = [p for s in segments for p in range(s.start, s.start + s.num_tokens)]
        token_ids = [t for s in segments for t in s.sequence.token_ids[s.start : s.start + s.num_tokens]]
        sampled, end = [], 0
        for segment in segments:
            end += segment.num_tokens
            if segment.samples:
                sampled.append(end - 1)
        owners = [owner for segment in segments for owner in _owners(segment)]
        self._lora.begin(owners, sampled, device)
        self._effects.begin(owners, sampled, device)
        self._attention.begin(self._attention_step(segments, device))
        logits: Tensor = self._model(
            input_ids=torch.tensor([token_ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(sampled, dtype=torch.long, device=device),
        ).logits[0]
        return logits if self._selects else logits[sampled]

    def _attention_step(self, segments: Sequence[Segment], device: torch.device) -> AttentionStep:
        new_slots: list[int] = []
        prefills: list[Prefill] = []
        decodes: list[tuple[int, Segment]] = []
        row = 0
        for segment in segments:
            if segment.num_tokens == 1:
                block, offset = divmod(segment.start, self._block_size)
                new_slots.append(segment.sequence.block_table[block] * self._block_size + offset)
                decodes.append((row, segment))
            else:
                slots = self._slots([segment.sequence.block_table])[0, : segment.start + segment.num_tokens]
                new_slots.extend(slots[segment.start :].tolist())
                prefills.append(Prefill(row, row + segment.num_tokens, segment.start, slots.to(device)))
            row += segment.num_tokens
        return AttentionStep(
            slots=torch.tensor(new_slots, device=device),
            decodes=self._decodes(decodes, device) if decodes else None,
            prefills=tuple(prefills),
        )

    def _decodes(self, decodes: list[tuple[int, Segment]], device: torch.device) -> Decodes:
        lengths = torch.tensor([segment.start + 1 for _, segment in decodes])
        max_len = int(lengths.max())
        slots = self._slots([segment.sequence.block_table for _, segment in decodes])[:, :max_len]
        padded = slots.masked_fill(torch.arange(max_len) >= lengths[:, None], self._num_slots)
        return Decodes(
            rows=torch.tensor([row for row, _ in decodes], device=device),
            slots=padded.reshape(-1).to(device),
            lengths=lengths.to(device),
            max_len=max_len,
        )

    def _slots(self, block_tables: Sequence[list[int]]) -> Tensor:
        """Cache rows of every position of each table, padded with block 0. Shape [B, most blocks · block size]."""
        longest = max(len(table) for table in block_tables)
        blocks = torch.tensor([table + [0] * (longest - len(table)) for table in block_tables])
        slots = blocks[:, :, None] * self._block_size + torch.arange(self._block_size)
        return slots.view(len(block_tables), -1)


def _owners(segment: Segment) -> list[Owners]:
    """The adapters of each of the segment's tokens, with their weights."""
    sequence, start, end = segment.sequence, segment.start, segment.start + segment.num_tokens
    borders = sorted({start, end, *(position for position in sequence.starts if start < position < end)})
    return [owner for begin, stop in itertools.pairwise(borders)
            for owner in [sequence.adapters_at(begin)] * (stop - begin)]  # fmt: skip


def _row(sequence: EngineSequence) -> Row:
    """What the sampler needs to know of one sequence."""
    sampling = sequence.request.sampling
    is_too_short = sequence.num_generated < sampling.min_tokens
    return Row(
        params=sampling,
        draw=uniform(sequence.seed, sequence.num_generated) if sampling.temperature > 0 else 0.0,
        banned=sequence.eos_token_ids.union(sampling.stop_token_ids) if is_too_short else frozenset(),
        token_ids=sequence.token_ids,
        output_counts=sequence.output_counts,
    )
