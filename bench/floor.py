"""Decoding one sequence against the floor: the weights' bytes over the bandwidth at which this machine reads them.

    python bench/floor.py --shape 1.1b

A step reads every weight but the table of the embeddings once. The bandwidth is that of matrix-vector products over as
many bytes (what a cache keeps of a small model is kept here too): torch's in float32 or ours in bfloat16, at one thread
or all, whichever reads fastest.
The step is the engine's alone, drafting off: medians of `--steps`, of each in turns, `--rounds` times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from long_prompt import NUM_STREAM_TOKENS, Bench
from safetensors import safe_open
from shapes import SHAPES, make_base

from loraplex.kernels.dense.linear import Linear, is_available

WIDTH = 2048  # columns of the matrix that is read


def weight_bytes(shape: str, models: Path) -> int:
    """That a decode step reads."""
    with safe_open(make_base(shape, models) / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys() if "embed_tokens" not in name)  # noqa: SIM118


def readers(size: int) -> dict[str, Callable[[], object]]:
    """Matrix-vector products over so many bytes, ours in pieces as large as layers."""
    rows = size // 4 // WIDTH
    matrix, vector = torch.ones(rows, WIDTH), torch.ones(WIDTH)
    found: dict[str, Callable[[], object]] = {"torch": lambda: torch.mv(matrix, vector)}
    if is_available(torch.bfloat16, torch.device("cpu")):
        parts = [min(WIDTH, 2 * rows - first) for first in range(0, 2 * rows, WIDTH)]
        layers = [Linear(torch.ones(part, WIDTH, dtype=torch.bfloat16)) for part in parts]
        x = vector[None].bfloat16()
        found["ours"] = lambda: [layer(x) for layer in layers]
    return found


def read_seconds(read: Callable[[], object], num_threads: int, count: int) -> float:
    """Of one reading, the median."""
    usual, took = torch.get_num_threads(), []
    torch.set_num_threads(num_threads)
    for _ in range(count):
        began = time.perf_counter()
        read()
        took.append(time.perf_counter() - began)
    torch.set_num_threads(usual)
    return statistics.median(took)


def step_seconds(bench: Bench, count: int) -> float:
    """Of one sequence's decode step, the median."""
    stream = bench.submit(NUM_STREAM_TOKENS, 2 + count)
    bench.steps(most=2)
    took = bench.steps(most=count)
    bench.core.end(stream, aborted=True)
    return statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    parser.add_argument("--steps", type=int, default=20, help="of one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the engine")
    parser.add_argument("--models", type=Path, default=Path("/tmp/loraplex-bench"), help="where the weights are kept")
    options = parser.parse_args()
    bench = Bench(argparse.Namespace(**vars(options), kv_mib=256, chunk=512, streams=1))
    size = weight_bytes(options.shape, options.models)
    ways = {(name, number): read for name, read in readers(size).items() for number in {1, os.cpu_count() or 1}}
    reads: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    steps = []
    for turn in range(options.rounds + 1):
        step = step_seconds(bench, options.steps)
        for way, read in ways.items():
            reads[way].append(read_seconds(read, way[1], options.steps))
        if turn:  # the first round warms up
            steps.append(step)
    best = min(ways, key=lambda way: statistics.median(reads[way][1:]))
    floor, step = statistics.median(reads[best][1:]), statistics.median(steps)
    print(f"{options.shape} ({SHAPES[options.shape].dtype}), {size / 2**20:.0f} MiB of weights a step, "
          f"{torch.get_num_threads()} threads of the engine")  # fmt: skip
    print(f"  read bandwidth {size / floor / 1e9:8.1f} GB/s ({best[0]}, {best[1]} threads)")
    print(f"  floor          {floor * 1e3:8.2f} ms")
    print(f"  step           {step * 1e3:8.2f} ms")
    print(f"  step / floor   {step / floor:8.2f}")


if __name__ == "__main__":
    main()
