"""What is captured and replayed of a step on a GPU: a CUDA graph of decodes, for any adapters.

Its inputs are rows of the same few tensors for every number of tokens, so that a graph costs no tables of its own.
Steps are padded to a few sizes: a GPU's decode reads the weights once, however many rows there are. A row that pads
looks at nothing, and leaves its key and value in a row of the cache that nobody reads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.engines.native.capture import NotCapturable
from loraplex.engines.native.device_attention import KernelDecodes, KernelStep
from loraplex.engines.native.replays import Recording, Step

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # tokens of a graph
# A GEMM may add in another order where its workspace is another: within a unit in the last place of bfloat16, of the
# largest logit of the row.
_TOLERANCE = 2**-7


@dataclass(frozen=True, slots=True)
class _Rows:
    """The inputs of the largest step. token_ids, positions, slots: Shape [T], int64. block_tables: Shape [T, W], int32.

    lengths: Shape [T], int32.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    lengths: Tensor

    @classmethod
    def empty(cls, num_blocks: int, device: torch.device) -> _Rows:
        """`num_blocks`: the longest table."""
        numbers = torch.zeros(3, SIZES[-1], dtype=torch.int64, device=device)
        tables = torch.zeros(SIZES[-1], num_blocks, dtype=torch.int32, device=device)
        token_ids, positions, slots = numbers.unbind()
        return cls(token_ids, positions, slots, tables, torch.zeros_like(tables[:, 0]))


class CudaInputs:
    """The first rows of the inputs, as one step sees them."""

    def __init__(self, rows: _Rows, num_tokens: int, block_size: int, spare_slot: int) -> None:
        """`spare_slot`: the row of the cache where padding leaves its keys and values."""
        self._rows = rows
        self._num_tokens = num_tokens
        self._spare_slot = spare_slot
        own = slice(0, num_tokens)
        self.token_ids, self.positions = rows.token_ids[None, own], rows.positions[None, own]
        self.sampled = torch.arange(num_tokens, device=rows.slots.device)
        tables = rows.block_tables[own]
        decodes = KernelDecodes(self.sampled, tables, rows.lengths[own], longest=tables.shape[1] * block_size)
        self.attention = KernelStep(rows.slots[own], decodes, None, block_size)

    def become(self, step: Step) -> None:
        """Be this step, all of whose tokens are sampled."""
        attention, rows, count = step.attention, self._rows, step.num_tokens
        assert isinstance(attention, KernelStep)
        assert attention.decodes is not None
        padding, device = [0] * (self._num_tokens - count), rows.slots.device
        rows.token_ids[: self._num_tokens] = torch.tensor([*step.token_ids, *padding], device=device)
        rows.positions[: self._num_tokens] = torch.tensor([*step.positions, *padding], device=device)
        rows.slots[:count] = attention.slots
        rows.slots[count : self._num_tokens] = self._spare_slot
        rows.lengths[:count] = attention.decodes.lengths
        rows.lengths[count : self._num_tokens] = 0
        tables = attention.decodes.block_tables
        rows.block_tables[:count, : tables.shape[1]] = tables


@dataclass(frozen=True, slots=True)
class CudaRecording:
    """A CUDA graph and where it leaves its logits."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.logits


class CudaRecorder:
    """Records CUDA graphs that share their memory, for one is replayed at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Callable[[], Tensor]) -> CudaRecording:
        """Raises NotCapturable. Other threads may go on copying adapters meanwhile."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = forward()
        except RuntimeError as error:
            raise NotCapturable(str(error).partition("\n")[0]) from error
        return CudaRecording(graph, logits)


class CudaReplays:
    """Implements `Replays`."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        record: Callable[[Callable[[], Tensor]], Recording],
    ) -> None:
        """`num_blocks`: of the cache, whose row behind the zeros nobody reads."""
        self._record = record
        self._block_size = block_size
        self._spare_slot = num_blocks * block_size + 1
        self._num_blocks, self._device = num_blocks, device
        self._rows: _Rows | None = None

    def takes(self, step: Step) -> bool:
        """Whether it decodes a token of each sequence, and nothing else."""
        attention = step.attention
        is_decoding = isinstance(attention, KernelStep) and attention.prefills is None
        return is_decoding and step.samples_all and step.num_tokens <= SIZES[-1]

    def padded(self, num_tokens: int, *, is_even: bool) -> int:
        return SIZES[bisect_left(SIZES, num_tokens)]

    def inputs(self, num_tokens: int, num_sampled: int) -> CudaInputs:
        if self._rows is None:
            self._rows = _Rows.empty(self._num_blocks, self._device)
        return CudaInputs(self._rows, num_tokens, self._block_size, self._spare_slot)

    def record(self, forward: Callable[[], Tensor]) -> tuple[Tensor, Recording]:
        """Computed first: capturing computes nothing, and must not be what compiles a kernel. Raises NotCapturable."""
        logits = forward()
        return logits, self._record(forward)

    def agree(self, replayed: Tensor, computed: Tensor) -> bool:
        """But for rounding, also where they are no numbers."""
        largest = computed.abs().amax(dim=-1, keepdim=True).nan_to_num()
        return bool(
            torch.isclose(replayed / largest, computed / largest, rtol=0, atol=_TOLERANCE, equal_nan=True).all()
        )
