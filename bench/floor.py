"""Decoding one sequence against the floor: the weights' bytes over the bandwidth at which this machine reads them.

    python bench/floor.py --shape 1.1b

A step reads every weight but the table of the embeddings once. The bandwidth is that of a float32 matrix-vector product
over as many bytes (what a cache keeps of a small model is kept here too), at the number of threads that reads fastest.
The step is the engine's alone, drafting off: medians of `--steps`, of each in turns, `--rounds` times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from long_prompt import NUM_STREAM_TOKENS, Bench
from safetensors import safe_open
from shapes import SHAPES, make_base

WIDTH = 2048  # columns of the matrix that is read


def weight_bytes(shape: str, models: Path) -> int:
    """That a decode step reads."""
    with safe_open(make_base(shape, models) / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys() if "embed_tokens" not in name)  # noqa: SIM118


def read_seconds(matrix: torch.Tensor, num_threads: int, count: int) -> float:
    """Of one matrix-vector product over the whole matrix [rows, WIDTH], the median."""
    usual, vector, took = torch.get_num_threads(), torch.ones(WIDTH), []
    torch.set_num_threads(num_threads)
    for _ in range(count):
        began = time.perf_counter()
        torch.mv(matrix, vector)
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
    matrix = torch.ones(size // 4 // WIDTH, WIDTH)
    threads = sorted({1, os.cpu_count() or 1})
    reads: dict[int, list[float]] = {number: [] for number in threads}
    steps = []
    for turn in range(options.rounds + 1):
        step = step_seconds(bench, options.steps)
        for number in threads:
            reads[number].append(read_seconds(matrix, number, options.steps))
        if turn:  # the first round warms up
            steps.append(step)
    best = min(threads, key=lambda number: statistics.median(reads[number][1:]))
    floor, step = statistics.median(reads[best][1:]), statistics.median(steps)
    print(f"{options.shape} ({SHAPES[options.shape].dtype}), {size / 2**20:.0f} MiB of weights a step, "
          f"{torch.get_num_threads()} threads of the engine")  # fmt: skip
    print(f"  read bandwidth {matrix.nbytes / floor / 1e9:8.1f} GB/s ({best} threads)")
    print(f"  floor          {floor * 1e3:8.2f} ms")
    print(f"  step           {step * 1e3:8.2f} ms")
    print(f"  step / floor   {step / floor:8.2f}")


if __name__ == "__main__":
    main()
