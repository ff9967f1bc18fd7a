"""Batch -> one forward pass -> what each segment gives: tokens, log-probabilities of its prompt, or its own error.

Everything that touches tensors during a step is here or below; who is in the batch is not decided here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.engines.adapters.arena import Arena
from loraplex.engines.native.attention import AttentionStep, Decodes, PagedAttention, Prefill
from loraplex.engines.native.batch import Batch, Outcome, Segment
from loraplex.engines.native.cpu_replays import MOST_TOKENS, CpuReplays
from loraplex.engines.native.cpu_sampler import pick_by_kernel
from loraplex.engines.native.cuda_replays import CudaRecorder, CudaReplays
from loraplex.engines.native.device_attention import KernelStep
from loraplex.engines.native.device_lora import DeviceLora
from loraplex.engines.native.device_sampler import compile_draws, pick_by_thresholds
from loraplex.engines.native.effects import Effects
from loraplex.engines.native.experts import compute_each, runs_experts
from loraplex.engines.native.lora import LoraLayers, Owners
from loraplex.engines.native.model import Trial
from loraplex.engines.native.outcomes import each_outcome, outcomes_of
from loraplex.engines.native.replays import Replays, Step
from loraplex.engines.native.sampler import Pick, pick_by_sorting
from loraplex.engines.native.step_graphs import StepGraphs
from loraplex.engines.native.stopwatch import Stopwatch
from loraplex.engines.native.tensors import int_tensor
from loraplex.kernels import calls
from loraplex.kernels.attention.cpu_decode import DecodeRows
from loraplex.kernels.attention.cpu_prefill import PrefillRuns
from loraplex.kernels.fused.cpu_draw import is_available as draws

# What is attended token by token, where that costs no copies: a decode and its drafts, and a short prompt, as long as
# its tokens do not look at more positions than these altogether. Where a kernel attends chunks it is faster for those;
# only small steps keep to this, which are replayed.
_SHORT = 8
_FEW_POSITIONS = 64 * 64


class _Tokens(NamedTuple):
    """A step's, one after another; `sampled` are the numbers of those behind which logits are wanted."""

    token_ids: list[int]
    positions: list[int]
    owners: list[Owners]
    sampled: list[int]

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> _Tokens:
        """Those of the segments, in turn."""
        tokens = cls([], [], [], [])
        for segment in segments:
            sequence, start, begin = segment.sequence, segment.start, len(tokens.positions)
            if segment.num_tokens == 1:  # most are decodes
                tokens.token_ids.append(sequence.token_ids[start])
                tokens.positions.append(start)
                tokens.owners.append(sequence.adapters_at(start))
            else:
                tokens.token_ids.extend(segment.token_ids)
                tokens.positions.extend(range(start, start + segment.num_tokens))
                tokens.owners.extend(_owners(segment))
            tokens.sampled.extend([begin + row for row in segment.rows])
        return tokens


class Runner:
    """Steps one model over one KV cache and one arena.

    With a `tile`, every forward pass has exactly that many tokens, whatever the step: see `tiles.py`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trial: Trial,
        attention: PagedAttention,
        arena: Arena,
        num_blocks: int,
        block_size: int,
        *,
        uses_kernels: bool = False,
        uses_gemms: bool = True,
        replays: bool = True,
    ) -> None:
        """`uses_kernels`: LoRA, attention and draws are those of Triton. `uses_gemms`: see `LoraLayers`.

        `replays`: steps may be those of `StepGraphs`.
        """
        self._model = model
        self._device = model.device  # which transformers looks up among all parameters
        self.stopwatch = Stopwatch()
        self._num_slots = num_blocks * block_size
        self._attention = attention
        self._block_size = block_size
        self._offsets = np.arange(block_size)
        self._uses_kernels = uses_kernels
        self._lora = DeviceLora(arena) if uses_kernels else LoraLayers(arena, uses_gemms=uses_gemms)
        self._pick = _pick_for(model, uses_kernels=uses_kernels)
        self._selects = trial.selects
        for name, (layer, module) in trial.layers.items():
            self._lora.wrap(layer, module, behind_selection=trial.passages[name].selected)
        self._effects = Effects(model, trial, arena)
        possible = self._replays() if replays else None
        self.graphs = StepGraphs(self._through_model, attention, self._lora, possible) if possible else None
        self.tile: int | None = None
        self.is_settled = True  # whether the last step took as long as others like it will
        for experts in filter(runs_experts, model.modules()):
            compute_each(experts, lambda: self.tile is not None)
        self._hidden: Tensor | None = None
        if trial.decoder is not None:
            trial.decoder.register_forward_hook(self._keep_hidden)

    def _replays(self) -> Replays | None:
        if self._device.type == "cuda" and self._uses_kernels:
            num_blocks = self._num_slots // self._block_size
            return CudaReplays(num_blocks, self._block_size, self._device, CudaRecorder())
        return CpuReplays(self._num_slots + 1) if self._attention.reads_in_place and calls.is_available() else None

    @torch.inference_mode()
    def compile_kernels(self, max_rank: int) -> None:
        """Have Triton compile what LoRA of up to that rank and draws want: the first requests would wait for it."""
        if isinstance(self._lora, DeviceLora):
            self._lora.compile_kernels(max_rank)
            compile_draws(self._model.config.get_text_config().vocab_size, self._device)

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Outcome]:
        """What each of the batch's segments gives, in that order."""
        with self.stopwatch.phase("forward"):
            logits = self.logits(batch)
        with self.stopwatch.phase("sample"):
            make = outcomes_of if self.tile is None else each_outcome
            outcomes = make(batch.segments, logits, self._pick)
            return self._with_hidden(batch.segments, outcomes) if any(s.pooled for s in batch.segments) else outcomes

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """The forward pass: the logits behind the `rows` of each segment. Shape [N, V]."""
        self.is_settled = True
        segments = batch.segments
        token_ids, positions, owners, sampled = _Tokens.of(segments)
        if self.tile is not None:
            return self._in_tiles(segments, token_ids, positions, owners, sampled, self.tile)
        attention = self._attention_step(segments, len(token_ids), self._device)
        is_even = len(token_ids) == len(segments)
        step, graphs = Step(attention, token_ids, positions, owners, sampled, is_even), self.graphs
        if graphs and graphs.takes(step) and not any(segment.pooled for segment in segments):
            self._effects.begin((), (), self._device)
            logits = graphs.logits(step)
            self.is_settled = graphs.is_settled
            return logits
        self._attention.begin(attention.to(self._device) if isinstance(attention, KernelStep) else attention)
        return self._forward(token_ids, positions, owners, sampled)

    def _in_tiles(
        self,
        segments: Sequence[Segment],
        token_ids: list[int],
        positions: list[int],
        owners: list[Owners],
        sampled: list[int],
        tile: int,
    ) -> Tensor:
        """The same in forward passes of `tile` tokens, the last one padded; where logits are wanted, all are made."""
        device = self._device
        slots = [self._slots([s.sequence.block_table])[0, : s.start + s.num_tokens].to(device) for s in segments]
        found, hidden = [], []
        for begin in range(0, len(token_ids), tile):
            end = min(begin + tile, len(token_ids))
            padding = begin + tile - end
            wanted = [row - begin for row in sampled if begin <= row < end]
            self._attention.begin(self._tile_step(segments, slots, begin, end, padding))
            logits = self._forward(
                token_ids[begin:end] + [0] * padding,
                positions[begin:end] + [0] * padding,
                owners[begin:end] + [()] * padding,
                list(range(tile)) if wanted else [],
                one_by_one=True,
            )
            found.append(logits[wanted])
            if self._hidden is not None:
                hidden.append(self._hidden[: end - begin])
        self._hidden = torch.cat(hidden) if hidden else None
        return torch.cat(found)

    def _tile_step(
        self, segments: Sequence[Segment], slots: Sequence[Tensor], begin: int, end: int, padding: int
    ) -> AttentionStep:
        """Of the step's tokens begin … end − 1. `slots`: for each segment, the cache rows of all of its tokens."""
        runs, new_slots, first = [], [], 0
        for segment, own in zip(segments, slots, strict=True):
            low, high = max(begin - first, 0), min(end - first, segment.num_tokens)
            if low < high:
                start = segment.start + low
                own = own[: segment.start + high]
                runs.append(Prefill(first + low - begin, first + high - begin, start, own))
                new_slots.append(own[start:])
            first += segment.num_tokens
        new_slots.append(torch.full((padding,), self._num_slots + 1, device=self._device))
        each = _each_row(runs, end - begin + padding) if self._attention.reads_in_place else None
        return AttentionStep(torch.cat(new_slots), decodes=None, prefills=tuple(runs), one_by_one=True, each=each)

    def _forward(
        self,
        token_ids: list[int],
        positions: list[int],
        owners: list[Owners],
        sampled: list[int],
        *,
        one_by_one: bool = False,
    ) -> Tensor:
        """Over tokens whose attention is set. The logits behind those that are `sampled`. Shape [N, V]."""
        device = self._device
        if isinstance(self._lora, LoraLayers):
            self._lora.begin(owners, sampled, device, one_by_one=one_by_one)
        else:
            self._lora.begin(owners, sampled, device)
        self._effects.begin(owners, sampled, device, one_by_one=one_by_one)
        return self._through_model(
            int_tensor(token_ids).to(device)[None],
            int_tensor(positions).to(device)[None],
            int_tensor(sampled).to(device),
        )

    def _through_model(self, token_ids: Tensor, positions: Tensor, sampled: Tensor) -> Tensor:
        """token_ids, positions: Shape [1, T]. sampled: Shape [N], numbers of tokens. Result: their logits."""
        with self._attention.intercepting():
            logits: Tensor = self._model(
                input_ids=token_ids, position_ids=positions, use_cache=False, logits_to_keep=sampled
            ).logits[0]
        return logits if self._selects else logits[sampled]

    def _with_hidden(self, segments: Sequence[Segment], outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The outcomes with the hidden states of what is pooled."""
        assert self._hidden is not None
        found, begin = [], 0
        for segment, outcome in zip(segments, outcomes, strict=True):
            if segment.pooled:
                first = begin + segment.pooled.start - segment.start
                rows = self._hidden[first : first + len(segment.pooled)].float().cpu().numpy()
                outcome = msgspec.structs.replace(outcome, hidden=rows)
            found.append(outcome)
            begin += segment.num_tokens
        self._hidden = None
        return found

    def _keep_hidden(self, module: nn.Module, inputs: object, output: Any) -> None:
        """Of the step's tokens. Shape [T, H]."""
        self._hidden = output[0][0]

    def _attention_step(
        self, segments: Sequence[Segment], num_tokens: int, device: torch.device
    ) -> AttentionStep | KernelStep:
        """Of segments that have so many tokens together."""
        if self._uses_kernels:
            return KernelStep.of(segments, self._block_size)
        new_slots: list[int] = []
        prefills: list[Prefill] = []
        rows: list[int] = []  # of decodes, each with the positions it looks at
        lengths: list[int] = []
        tables: list[list[int]] = []
        row, size = 0, self._block_size
        most_positions = _FEW_POSITIONS if num_tokens <= MOST_TOKENS or not self._attention.attends_runs else 0
        for segment in segments:
            table, start, end = segment.sequence.block_table, segment.start, segment.start + segment.num_tokens
            if segment.num_tokens == 1 or (self._attention.reads_in_place and _is_short(segment, most_positions)):
                for position in range(start, end):
                    new_slots.append(table[position // size] * size + position % size)
                    rows.append(row + position - start)
                    lengths.append(position + 1)
                    tables.append(table)
            else:
                slots = self._slots([table])[0, :end]
                new_slots.extend(slots[start:].tolist())
                prefills.append(Prefill(row, row + segment.num_tokens, start, slots.to(device)))
            row += segment.num_tokens
        return AttentionStep(
            slots=int_tensor(new_slots).to(device),
            decodes=self._decodes(rows, lengths, tables, device) if rows else None,
            prefills=tuple(prefills),
            runs=_runs_of(prefills) if prefills and self._attention.attends_runs else None,
        )

    def _decodes(
        self, rows: list[int], num_positions: list[int], tables: list[list[int]], device: torch.device
    ) -> Decodes:
        lengths, max_len = int_tensor(num_positions).to(device), max(num_positions)
        padded = self._slots(tables)[:, :max_len].to(device)
        if self._attention.reads_in_place:  # up to each length
            padded = padded.contiguous()
        else:
            padded = padded.masked_fill(torch.arange(max_len, device=device) >= lengths[:, None], self._num_slots)
        return Decodes(
            rows=int_tensor(rows).to(device),
            slots=padded,
            lengths=lengths,
            in_place=DecodeRows(padded, lengths),
        )

    def _slots(self, block_tables: Sequence[list[int]]) -> Tensor:
        """Cache rows of every position of each table, padded with block 0. Shape [B, most blocks · block size]."""
        blocks = np.zeros((len(block_tables), max(map(len, block_tables)), 1), dtype=np.int64)
        for row, table in zip(blocks, block_tables, strict=True):
            row[: len(table), 0] = table
        return torch.from_numpy((blocks * self._block_size + self._offsets).reshape(len(block_tables), -1))


def _pick_for(model: PreTrainedModel, *, uses_kernels: bool) -> Pick:
    if uses_kernels:
        return pick_by_thresholds
    return pick_by_kernel if draws(model.dtype, model.device) else pick_by_sorting


def _is_short(segment: Segment, most_positions: int) -> bool:
    end = segment.start + segment.num_tokens
    return segment.num_tokens <= _SHORT or segment.num_tokens * end <= most_positions


def _runs_of(prefills: Sequence[Prefill]) -> PrefillRuns:
    return PrefillRuns([(run.begin, run.end, run.start, run.slots) for run in prefills])


def _each_row(runs: Sequence[Prefill], num_rows: int) -> DecodeRows:
    """Every token of the runs by itself; rows that are in none of them look at nothing."""
    lengths = torch.zeros(num_rows, dtype=torch.int64)
    slots = torch.zeros(num_rows, max(len(run.slots) for run in runs), dtype=torch.int64)
    for run in runs:
        lengths[run.begin : run.end] = torch.arange(run.start, run.start + run.end - run.begin) + 1
        slots[run.begin : run.end, : len(run.slots)] = run.slots
    return DecodeRows(slots, lengths)


def _owners(segment: Segment) -> list[Owners]:
    """The adapters of each of the segment's tokens, with their weights."""
    sequence, start, end = segment.sequence, segment.start, segment.start + segment.num_tokens
    if not sequence.starts:
        return [()] * segment.num_tokens
    borders = sorted({start, end, *(position for position in sequence.starts if start < position < end)})
    return [owner for begin, stop in itertools.pairwise(borders)
            for owner in [sequence.adapters_at(begin)] * (stop - begin)]  # fmt: skip
