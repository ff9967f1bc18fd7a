"""Compiles the Triton kernels for a GPU that is not there, and tells what its machine code would ask of it.

    python -m support.absent_gpu 90 bfloat16     # compute capability 9.0; prints JSON, a list of `Compiled`
    python -m support.absent_gpu 90 steps        # what `compiled_by_steps` tells

Triton's wheel has all that compiling takes; only a driver is missing, for which one stands in here that knows a
target and launches nothing. To be run where Triton does not interpret.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import torch
import triton
from gpu_steps import BLOCK, RANKS, World
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from loraplex.engines.native import step_graphs
from loraplex.engines.native.batch import Batch
from loraplex.engines.native.cuda_replays import CudaRecording, CudaReplays
from loraplex.engines.native.step_graphs import StepGraphs
from loraplex.kernels.attention.cache_write import write_paged
from loraplex.kernels.attention.decode import attend_paged_decode
from loraplex.kernels.attention.paged import Form
from loraplex.kernels.attention.prefill import QueryTiles, attend_paged_prefill
from loraplex.kernels.attention.rotary import rotate
from loraplex.kernels.fused.gated import gated
from loraplex.kernels.fused.rms_norm import rms_norm
from loraplex.kernels.fused.truncation import truncate_logits
from loraplex.kernels.lora.expand import expand
from loraplex.kernels.lora.shrink import num_splits, shrink
from loraplex.kernels.lora.table import AdapterTable, Tiles

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Compiled:
    """shared: bytes a program wants of a processor. stack: bytes of registers that a thread has to spill to memory.

    copies: bytes of each kind of copy to shared memory that does not wait. narrow_loads: how many loads of two bytes.
    """

    kernel: str
    case: str
    shared: int
    registers: int
    stack: int
    copies: list[int]
    narrow_loads: int


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**30, "multiprocessor_count": 132, "max_num_regs": 2**16, "warpSize": 32}

    def load_binary(self, *_: object) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


class _Driver:
    """What Triton asks of a driver in order to compile, and a launcher that does nothing."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self.utils = _Utils()

    def launcher_cls(self, *_: object) -> Callable[..., None]:
        return lambda *_, **__: None

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _lora(width: int, dtype: torch.dtype, block: int, *, dora: bool) -> None:
    num_tokens = 2 * block
    table = AdapterTable.empty(torch.zeros(64, dtype=dtype), 2, 3)
    tiles = Tiles.of([token // block for token in range(num_tokens)], None, block, CPU)
    x, y = torch.zeros(2, num_tokens, width, dtype=dtype)
    h = shrink(x, table, torch.arange(3, dtype=torch.int32), tiles, 64, num_splits(width, tiles, 3, 64))
    expand(y, h[0], table, 1, tiles, y[0] if dora else None)


def _attention(width: int, dtype: torch.dtype, form: Form) -> None:
    keys, values = torch.zeros(2, 64, 2, width, dtype=dtype)
    q, k = (torch.zeros(1, 32, heads, width, dtype=dtype).transpose(1, 2) for heads in (8, 2))
    cos = torch.ones(1, 32, width, dtype=dtype)
    _, key = rotate(q, k, cos, cos)
    write_paged(keys, values, key[0], key[0], torch.arange(32))
    _attend(width, dtype, form)


def _attend(width: int, dtype: torch.dtype, form: Form) -> None:
    keys, values = torch.zeros(2, 64, 2, width, dtype=dtype)
    rows, tables = torch.zeros(32, 8, width, dtype=dtype), torch.zeros(32, 4, dtype=torch.int32)
    attend_paged_decode(rows, keys, values, tables, tables[:, 0], 16, form, 2)
    attend_paged_prefill(
        torch.empty_like(rows), rows, keys, values, tables, QueryTiles.of([(0, 0, 32, 0)], CPU), 16, form
    )


def _fused(width: int, dtype: torch.dtype) -> None:
    x = torch.zeros(4, width, dtype=dtype)
    rms_norm(x, x[0], 1e-6, x.clone())
    gated(x, x, "silu")
    truncate_logits(x.float(), torch.ones(4, dtype=torch.int32), torch.ones(4), torch.zeros(4))


def _cases(dtype: str) -> Iterator[tuple[str, Callable[[], None]]]:
    kind = DTYPES[dtype]
    for block in (16, 64):
        yield f"tiles of {block}, {dtype}", partial(_lora, 4096, kind, block, dora=False)
    yield f"width 4097, DoRA, {dtype}", partial(_lora, 4097, kind, 16, dora=True)
    for width in (64, 128, 256):
        yield f"heads of {width}, {dtype}", partial(_attention, width, kind, Form(0.1, None, None, None))
    everything = Form(0.1, 128, 30.0, torch.zeros(8, dtype=kind))
    yield f"heads of 96, window, cap and sinks, {dtype}", partial(_attention, 96, kind, everything)
    yield f"heads of 512, {dtype}", partial(_attend, 512, kind, Form(0.1, None, None, None))
    yield f"rows of 4096, {dtype}", partial(_fused, 4096, kind)


def compile_all(capability: int, dtype: str) -> Iterator[Compiled]:
    """Every kernel in the cases that differ in their code."""
    with _gpu(capability) as launched:
        for case, launch in _cases(dtype):
            launched.clear()
            launch()
            yield from (_told(kernel, case) for kernel in launched)


@contextmanager
def _gpu(capability: int) -> Iterator[list[Any]]:
    """Gives what is launched within it, compiled kernels, to which every launch is added."""
    driver.set_active(_Driver(capability))
    launched: list[Any] = []
    run = JITFunction.run

    def noting(function: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(run(function, *args, **kwargs))
        return launched[-1]

    with patch.object(JITFunction, "run", noting):
        yield launched


def _told(kernel: Any, case: str) -> Compiled:
    ptx: str = kernel.asm["ptx"]
    usage = dict(re.findall(r"(REG|STACK):(\d+)", _resource_usage(kernel.asm["cubin"])))
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (0x\w+)", ptx)
    return Compiled(
        kernel.name,
        case,
        kernel.metadata.shared,
        int(usage["REG"]),
        int(usage["STACK"]),
        sorted({int(size, 16) for size in copies}),
        len(re.findall(r"ld\.global(?:\.L\w+)*(?:::\w+)*\.b16\b", ptx)),
    )


def _resource_usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout


def compiled_by_steps(capability: int) -> dict[str, int]:
    """Kernel -> how many forms of it an engine compiles that has begun, while steps of many sizes come by.

    Decodes go through the tensors that graphs read, as on a GPU; none is captured.
    """
    with _gpu(capability) as launched, patch.object(step_graphs, "FEWEST_STEPS", 2**20):
        world = World("toy", 40, 40, CPU, uses_kernels=True)
        runner, width = world.runner, world.context // BLOCK + 1
        replays = CudaReplays(runner._num_slots // BLOCK, BLOCK, CPU, _refuse)
        runner.graphs = StepGraphs(runner._through_model, runner._attention, runner._lora, replays)
        runner.logits(world.prefill([]))
        runner.logits(world.decode(2, []))
        runner.compile_kernels(max(RANKS))
        known = {kernel.hash for kernel in launched}
        launched.clear()
        for batch in range(1, 41):
            decodes = world.decode(batch, world.adapters).segments
            chunk = world.prefill(world.adapters[batch % 40 :]).segments[0]
            chunk = msgspec.structs.replace(chunk, num_tokens=8 + 13 * batch)
            chunk.sequence.block_table = list(range(40 * width, 40 * width + world.chunk // BLOCK))
            runner.logits(Batch(step=0, segments=decodes))
            runner.logits(Batch(step=0, segments=(chunk,)))
            runner.logits(Batch(step=0, segments=(*decodes, chunk)))
        forms = {(kernel.name, kernel.hash) for kernel in launched if kernel.hash not in known}
        assert {"_shrink", "_expand", "_attend_split", "_attend_tile"} <= {kernel.name for kernel in launched}
    return dict(Counter(name for name, _ in forms))


def _refuse(forward: object) -> CudaRecording:
    raise AssertionError("there is nothing to record on")


if __name__ == "__main__":
    capability, what = int(sys.argv[1]), sys.argv[2]
    if what == "steps":
        print(json.dumps(compiled_by_steps(capability)))
    else:
        print(json.dumps([asdict(kernel) for kernel in compile_all(capability, what)]))
