"""Each kernel by itself: microseconds, GB/s, and per cent of the bandwidth that a plain copy reaches here.

    python bench/kernel_table.py [--ops lora/shrink,lora/expand] [--shape 8b] [--json FILE]

On a GPU it times the Triton kernels, on a CPU the forms that run there. GB/s counts the bytes the operation must touch
once: weights, keys and values, inputs and outputs. `padded` is the same kernel when every adapter has the largest rank,
as engines store them that pad. Medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel_cases import BEYOND_CACHES, SHAPES, Case, Shape, in_turn
from lora_cases import lora_decode, lora_expand, lora_grouped, lora_shrink
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from loraplex.engines.pages import in_large_pages
from loraplex.kernels.attention import cpu_rotary, rotary
from loraplex.kernels.attention.cache_write import write_paged
from loraplex.kernels.attention.cpu_decode import DecodeRows
from loraplex.kernels.attention.cpu_prefill import PrefillRuns
from loraplex.kernels.attention.decode import attend_paged_decode
from loraplex.kernels.attention.paged import Form, attend_chunk, attend_decode, chunk_mask
from loraplex.kernels.attention.prefill import QueryTiles, attend_paged_prefill
from loraplex.kernels.calls import Calls
from loraplex.kernels.dense.linear import Linear, Panels, int8_size, pack, panels_size, round_and_pack
from loraplex.kernels.fused import cpu_elementwise as elementwise
from loraplex.kernels.fused.cpu_gated import Gate
from loraplex.kernels.fused.cpu_rms_norm import RmsNorm
from loraplex.kernels.fused.gated import gated
from loraplex.kernels.fused.rms_norm import rms_norm
from loraplex.kernels.fused.truncation import truncate_logits

COPY_BYTES = 2**30
_IN_A_ROW = 24  # calls of a graph


@dataclass(frozen=True)
class Figure:
    op: str
    case: str
    microseconds: float
    gigabytes_per_second: float
    percent_of_copy: float


def packed_linear(weight: Tensor) -> Linear:
    panels = in_large_pages(panels_size(weight))
    pack(weight, panels)
    return Linear(weight, panels=Panels(panels))


def rounded_linear(weight: Tensor) -> Linear:
    panels = in_large_pages(int8_size(weight))
    return Linear(weight, panels=Panels(panels, round_and_pack(weight, panels)))


def dense_linear(shape: Shape, device: torch.device) -> list[Case]:
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        num_bytes = shape.intermediate * shape.hidden * dtype.itemsize
        number = -(-BEYOND_CACHES // num_bytes)
        weights = [torch.randn(shape.intermediate, shape.hidden).to(dtype) for _ in range(number)]
        packed = [packed_linear(weight) for weight in weights] if panels_size(weights[0]) else []
        rounded = [rounded_linear(weight) for weight in weights * dtype.itemsize] if int8_size(weights[0]) else []
        for count in (1, 4, 8, 16, 32, 64, 256, 448):
            x = torch.randn(count, shape.hidden).to(dtype)
            name = f"{count} tokens, {str(dtype).removeprefix('torch.')}"
            ours = in_turn([partial(Linear(weight), x) for weight in weights])
            theirs = in_turn([partial(functional.linear, x, weight) for weight in weights])
            cases.append(Case(name, ours, num_bytes + x.nbytes))
            if packed:
                cases.append(
                    Case(f"{name}, packed", in_turn([partial(layer, x) for layer in packed]), num_bytes + x.nbytes)
                )
            if rounded:
                num_small = num_bytes // dtype.itemsize + x.nbytes
                cases.append(Case(f"{name}, int8", in_turn([partial(layer, x) for layer in rounded]), num_small))
            cases.append(Case(f"{name}, torch", theirs, num_bytes + x.nbytes))
    return cases


def _cache(shape: Shape, batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    size = batch * length
    keys, values = (
        torch.randn(size, shape.key_heads, shape.width, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    return keys, values, torch.arange(size // 16, dtype=torch.int32, device=device).view(batch, length // 16)


def attention_decode(shape: Shape, device: torch.device) -> list[Case]:
    cases = []
    for batch, length in ((1, 8192), (32, 2048), (128, 512)):
        keys, values, table = _cache(shape, batch, length, device)
        q = torch.randn(batch, shape.heads, shape.width, dtype=torch.bfloat16, device=device)
        lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        run = partial(attend_paged_decode, q, keys, values, table, lengths, 16, Form(0.1))
        cases.append(Case(f"{batch} × {length}", run, 2 * keys.numel() * 2))
    return cases


def attention_cpu_prefill(shape: Shape, device: torch.device) -> list[Case]:
    """One layer's of a chunk of 512 tokens, first or behind others, beside torch's; what is read is a small part."""
    cases = []
    for before, dtype in itertools.product((0, 512, 3584), (torch.bfloat16, torch.float32)):
        length = before + 512
        keys, values = (cache.to(dtype) for cache in _cache(shape, 1, length, device)[:2])
        q = torch.randn(shape.heads, 512, shape.width, device=device).to(dtype)
        slots = (torch.randperm(length // 16)[:, None] * 16 + torch.arange(16)).view(-1)
        runs, form, out = PrefillRuns([(0, 512, before, slots)]), Form(0.1), q.new_empty(512, shape.heads, shape.width)
        name = f"512 tokens behind {before}, {str(dtype).removeprefix('torch.')}"
        num_bytes = 2 * keys.nbytes + q.nbytes + out.nbytes
        cases.append(Case(name, partial(runs.attend, q, keys, values, form, out), num_bytes))
        theirs = partial(attend_chunk, q[None], keys, values, slots, chunk_mask(before, 512, form, q), form)
        if not before:
            k, v = (cache.transpose(0, 1)[None] for cache in (keys, values))
            theirs = partial(
                functional.scaled_dot_product_attention, q[None], k, v, is_causal=True, scale=0.1, enable_gqa=True
            )
        cases.append(Case(f"{name}, torch", theirs, num_bytes))
    return cases


def attention_prefill(shape: Shape, device: torch.device) -> list[Case]:
    length = 4096
    keys, values, table = _cache(shape, 1, length, device)
    q = torch.randn(length, shape.heads, shape.width, dtype=torch.bfloat16, device=device)
    out, tiles = torch.empty_like(q), QueryTiles.of([(0, 0, length, 0)], device)
    return [Case(f"1 × {length}", lambda: attend_paged_prefill(out, q, keys, values, table, tiles, 16, Form(0.1)),
                 2 * (q.numel() * 2 + keys.numel() * 2))]  # fmt: skip


def attention_paged(shape: Shape, device: torch.device) -> list[Case]:
    batch, length = 8, 512
    keys, values, _ = _cache(shape, batch, length, device)
    q = torch.randn(batch, shape.heads, shape.width, dtype=torch.bfloat16, device=device)
    mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    k, v = (cache.view(batch, length, shape.key_heads, shape.width) for cache in (keys, values))
    return [Case(f"{batch} × {length}", lambda: attend_decode(q, k, v, mask, Form(0.1)), 2 * keys.numel() * 2)]


def attention_cpu_decode(shape: Shape, device: torch.device) -> list[Case]:
    """One layer's of a step: blocks of 16 in any order, caches of as many layers in turn as the CPU's do not keep."""
    cases = []
    for batch, length in ((8, 128), (8, 1024), (8, 4096)):
        num_bytes = 2 * batch * length * shape.key_heads * shape.width * 2
        caches = [_cache(shape, batch, length, device)[:2] for _ in range(-(-BEYOND_CACHES // num_bytes))]
        q = torch.randn(batch, shape.heads, shape.width, dtype=torch.bfloat16, device=device)
        blocks = torch.randperm(batch * length // 16)[:, None] * 16
        slots = (blocks + torch.arange(16)).view(batch, length)
        rows = DecodeRows(slots, torch.full((batch,), length))
        run = in_turn([partial(rows.attend, q, keys, values, Form(0.1)) for keys, values in caches])
        cases.append(Case(f"{batch} × {length}", run, num_bytes))
    return cases


def fused_rms_norm(shape: Shape, device: torch.device) -> list[Case]:
    x, residual = (torch.randn(512, shape.hidden, dtype=torch.bfloat16, device=device) for _ in range(2))
    weight = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
    return [Case("512 tokens", lambda: rms_norm(x, weight, 1e-5, residual), 4 * x.numel() * 2)]


def fused_cpu_rms_norm(shape: Shape, device: torch.device) -> list[Case]:
    cases = []
    theirs = LlamaRMSNorm(shape.hidden).to(torch.bfloat16)
    ours = RmsNorm(theirs.weight.detach().float(), 1e-6, torch.bfloat16, rounds_twice=True)
    for count in (1, 8, 512):
        x = torch.randn(count, shape.hidden, dtype=torch.bfloat16)
        cases.append(Case(f"{count} tokens", partial(ours, x), 2 * x.nbytes))
        cases.append(Case(f"{count} tokens, transformers", partial(theirs, x), 2 * x.nbytes))
    return cases


def attention_rotary(shape: Shape, device: torch.device) -> list[Case]:
    """Beside transformers' function."""
    rotate = (cpu_rotary if device.type == "cpu" else rotary).rotate
    cases = []
    for count in (1, 8, 512):
        q, k = (
            torch.randn(1, count, heads, shape.width, device=device).bfloat16().transpose(1, 2)
            for heads in (shape.heads, shape.key_heads)
        )
        cos, sin = (torch.randn(1, count, shape.width, device=device).bfloat16() for _ in range(2))
        num_bytes = 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
        cases.append(Case(f"{count} tokens", partial(rotate, q, k, cos, sin), num_bytes))
        cases.append(Case(f"{count} tokens, transformers", partial(apply_rotary_pos_emb, q, k, cos, sin), num_bytes))
    return cases


def attention_cache_write(shape: Shape, device: torch.device) -> list[Case]:
    """Beside torch's two operations."""
    keys, values, _ = _cache(shape, 32, 128, device)
    cases = []
    for count in (32, 2048):
        x = torch.randn(count, shape.key_heads, shape.width, device=device).bfloat16()
        key, slots = x.transpose(0, 1), torch.randperm(len(keys), device=device)[:count]

        def by_torch(x: Tensor = x, slots: Tensor = slots) -> None:
            for cache in (keys, values):
                cache.index_copy_(0, slots, x)

        cases.append(Case(f"{count} tokens", partial(write_paged, keys, values, key, key, slots), 4 * x.nbytes))
        cases.append(Case(f"{count} tokens, torch", by_torch, 4 * x.nbytes))
    return cases


def fused_gated(shape: Shape, device: torch.device) -> list[Case]:
    gate, up = (torch.randn(512, shape.intermediate, dtype=torch.bfloat16, device=device) for _ in range(2))
    return [Case("512 tokens", lambda: gated(gate, up, "silu"), 3 * gate.numel() * 2)]


def fused_cpu_gated(shape: Shape, device: torch.device) -> list[Case]:
    """Beside torch's two operations."""
    cases = []
    ours = Gate("silu", torch.bfloat16)
    for count in (1, 8, 240):
        gate, up = (torch.randn(count, shape.intermediate, device=device).bfloat16() for _ in range(2))
        cases.append(Case(f"{count} tokens", partial(ours, gate, up), 3 * gate.nbytes))
        cases.append(Case(f"{count} tokens, torch", partial(_gate_by_torch, gate, up), 3 * gate.nbytes))
    return cases


def _gate_by_torch(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def fused_truncation(shape: Shape, device: torch.device) -> list[Case]:
    logits = torch.randn(32, shape.vocab, device=device)
    k = torch.full((32,), 50, dtype=torch.int32, device=device)
    p, floor = torch.full((32,), 0.9, device=device), torch.zeros(32, device=device)
    return [
        Case("32 rows", lambda: truncate_logits(logits, k, p, floor), 2 * logits.numel() * 4),
        Case("32 rows, by sorting", lambda: logits.softmax(-1).sort(descending=True), 2 * logits.numel() * 4),
    ]


def fused_cpu_elementwise(shape: Shape, device: torch.device) -> list[Case]:
    """Beside torch's own."""
    cases = []
    for count in (8, 512):
        a, b, y = (torch.randn(count, shape.hidden, device=device).bfloat16() for _ in range(3))
        calls = [call for call in (elementwise.add(a, b, y), elementwise.multiply(a, b, y)) if call is not None]
        for name, call in zip(("add", "multiply"), calls, strict=True):
            cases.append(Case(f"{name}, {count} tokens", Calls([call]), 3 * a.numel() * 2))
        cases.append(Case(f"torch.add, {count} tokens", partial(torch.add, a, b, out=y), 3 * a.numel() * 2))
    return cases


def fused_cpu_draw(shape: Shape, device: torch.device) -> list[Case]:
    """Beside the forms of torch, which sort."""
    # A machine that is there for its GPU alone lacks msgspec, which these are made with.
    from loraplex.engines.native.cpu_sampler import pick_by_kernel
    from loraplex.engines.native.sampler import Row, pick_by_sorting
    from loraplex.engines.protocol import SamplingParams

    cases = []
    controls: dict[str, dict[str, Any]] = {
        "likeliest": {"temperature": 0.0},
        "drawn": {},
        "of the 50 likeliest": {"top_k": 50},
        "top-p 0.9": {"top_p": 0.9},
    }
    for count in (1, 8, 32):
        logits = torch.randn(count, shape.vocab, dtype=torch.bfloat16) * 3
        for name, some in controls.items():
            params = SamplingParams(max_tokens=1, **{"temperature": 0.8, **some})
            rows = [Row(params, draw=(number + 0.5) / count) for number in range(count)]
            cases.append(Case(f"{count} rows, {name}", partial(pick_by_kernel, logits, rows), logits.nbytes))
            cases.append(Case(f"{count} rows, {name}, torch", partial(pick_by_sorting, logits, rows), logits.nbytes))
    return cases


ON_CPU = {
    "dense/linear": dense_linear,
    "lora/decode": lora_decode,
    "lora/grouped": lora_grouped,
    "attention/cpu_decode": attention_cpu_decode,
    "attention/cpu_prefill": attention_cpu_prefill,
    "attention/cpu_rotary": attention_rotary,
    "attention/paged": attention_paged,
    "fused/cpu_rms_norm": fused_cpu_rms_norm,
    "fused/cpu_elementwise": fused_cpu_elementwise,
    "fused/cpu_gated": fused_cpu_gated,
    "fused/cpu_draw": fused_cpu_draw,
}
ON_GPU = {
    "lora/shrink": lora_shrink,
    "lora/expand": lora_expand,
    "attention/decode": attention_decode,
    "attention/prefill": attention_prefill,
    "attention/rotary": attention_rotary,
    "attention/cache_write": attention_cache_write,
    "fused/rms_norm": fused_rms_norm,
    "fused/gated": fused_gated,
    "fused/truncation": fused_truncation,
}


def seconds_of(run: Callable[[], object], device: torch.device, rounds: int = 50) -> float:
    """Median of `rounds` calls after a few that warm up."""
    for _ in range(5):
        run()
    found: list[float] = []
    for _ in range(rounds):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            run()
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def kernel_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of a call in a row of calls. On a GPU they are one CUDA graph: launching each would take longer than it runs."""
    if device.type != "cuda":
        return seconds_of(run, device)
    run()  # which compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_IN_A_ROW):
            run()
    return seconds_of(graph.replay, device, rounds=9) / _IN_A_ROW


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a plain copy."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds_of(lambda: target.copy_(source), device, rounds=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", help="which, separated by commas; all that run here if left out")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ops = ON_GPU if device.type == "cuda" else ON_CPU
    bandwidth = copy_bandwidth(device)
    print(f"{options.shape} on {device}: a copy moves {bandwidth / 1e9:.0f} GB/s, read and written")
    figures = []
    for op in options.ops.split(",") if options.ops else ops:
        for case in ops[op](SHAPES[options.shape], device):
            seconds = kernel_seconds(case.run, device)
            rate = case.num_bytes / seconds
            figures.append(Figure(op, case.name, seconds * 1e6, rate / 1e9, 100 * rate / bandwidth))
            speed = f"{seconds * 1e6:10.1f} µs {rate / 1e9:8.1f} GB/s {100 * rate / bandwidth:5.0f} %"
            print(f"{op:20} {case.name:24} {speed}")
    if options.json:
        options.json.write_text(json.dumps({"copy": bandwidth, "figures": [asdict(figure) for figure in figures]}))


if __name__ == "__main__":
    main()
