"""What is captured and replayed of a step on a GPU: a CUDA graph of decodes, for any adapters.

Its block tables are rows of the same tensor for every number of tokens, so that a graph costs none of its own.
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


class CudaInputs:
    """Of steps of so many tokens, on the device: tables, and all other numbers in one tensor, which takes one copy."""

    def __init__(self, tables: Tensor, num_tokens: int, block_size: int, spare_slot: int) -> None:
        """`tables`: of the largest step, Shape [T, W]. `spare_slot`: where padding leaves its keys and values."""
        self._numbers = torch.zeros(4, num_tokens, dtype=torch.int64, device=tables.device)
        self._tables = tables
        self._spare_slot = spare_slot
        token_ids, positions, slots, lengths = self._numbers.unbind()
        self.token_ids, self.positions = token_ids[None], positions[None]
        self.sampled = torch.arange(num_tokens, device=tables.device)
        longest = tables.shape[1] * block_size
        decodes = KernelDecodes(self.sampled, tables[:num_tokens], lengths, longest)
        self.attention = KernelStep(slots, decodes, None, block_size)

    def become(self, step: Step) -> None:
        """Be this step, all of whose tokens are sampled."""
        attention, count = step.attention, step.num_tokens
        assert isinstance(attention, KernelStep)
        assert attention.decodes is not None
        numbers = torch.zeros(self._numbers.shape, dtype=torch.int64)
        numbers[2] = self._spare_slot
        numbers[:, :count] = torch.stack((
            torch.tensor(step.token_ids), torch.tensor(step.positions), attention.slots, attention.decodes.lengths
        ))  # fmt: skip
        self._numbers.copy_(numbers)
        tables = attention.decodes.block_tables
        self._tables[:count, : tables.shape[1]] = tables


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
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = forward()
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # what cannot end a capture stays on the stream that it was made on
            reason = error.__context__ or error  # that the capture failed is said in place of why
            raise NotCapturable(str(reason).partition("\n")[0]) from error
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
        self._tables: Tensor | None = None

    def takes(self, step: Step) -> bool:
        """Whether it decodes a token of each sequence, and nothing else."""
        attention = step.attention
        is_decoding = isinstance(attention, KernelStep) and attention.prefills is None
        return is_decoding and step.samples_all and step.num_tokens <= SIZES[-1]

    def padded(self, num_tokens: int, *, is_even: bool) -> int:
        return SIZES[bisect_left(SIZES, num_tokens)]

    def inputs(self, num_tokens: int, num_sampled: int) -> CudaInputs:
        if self._tables is None:
            self._tables = torch.zeros(SIZES[-1], self._num_blocks, dtype=torch.int32, device=self._device)
        return CudaInputs(self._tables, num_tokens, self._block_size, self._spare_slot)

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
