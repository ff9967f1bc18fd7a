"""Whole forward steps of random weights on a GPU: decode and prefill with ever more adapters, against base alone.

    python bench/gpu_steps.py --shape 8b [--adapters 0,1,8,32,64,256] [--resident 0] [--context 512] [--chunk 2048]
        [--json FILE]

No scheduler, gateway or disk: adapters of ranks 8, 16, 32 and 64 in turn are random numbers straight in the arena.
`floor` is the time in which a plain copy reads and writes as many bytes together as the weights have. Decodes are
measured as they go through the model, and again as CUDA graphs, where they can be captured; `replayed` says which.
Medians.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from kernel_table import copy_bandwidth, seconds_of
from shapes import SHAPES, TARGETS
from transformers import AutoModelForCausalLM, PreTrainedModel

from loraplex.engines.adapters.arena import Arena
from loraplex.engines.adapters.config import LoraConfig, read_config
from loraplex.engines.adapters.extras import ExtraPlan
from loraplex.engines.adapters.peft import AdapterPlan, LoadedAdapter, ModuleEntry
from loraplex.engines.native.attention import PagedAttention
from loraplex.engines.native.batch import Batch, Segment
from loraplex.engines.native.gates import use_gate_kernel
from loraplex.engines.native.model import Trial, dry_run
from loraplex.engines.native.norms import use_norm_kernel
from loraplex.engines.native.rotary import use_rotary_kernel
from loraplex.engines.native.runner import Runner
from loraplex.engines.native.sequence import Sequence
from loraplex.engines.native.step_graphs import MOST_STEPS
from loraplex.engines.protocol import Adapter, GenerateRequest, SamplingParams

RANKS = (8, 16, 32, 64)
BLOCK = 16


@dataclass(frozen=True)
class Figure:
    shape: str
    phase: str
    batch: int
    num_adapters: int
    num_resident: int
    milliseconds: float
    tokens_per_second: float
    ratio_to_base: float
    times_floor: float
    replayed: bool


class World:
    """A model of random weights over its cache, and an arena full of adapters of random numbers."""

    def __init__(
        self,
        shape: str,
        num_adapters: int,
        max_batch: int,
        device: torch.device,
        *,
        uses_kernels: bool,
        context: int = 512,
        chunk: int = 2048,
    ) -> None:
        self.context, self.chunk = context, chunk
        attention = PagedAttention()
        with torch.device(device):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                SHAPES[shape].config(), dtype=SHAPES[shape].dtype, attn_implementation=attention.name
            )
        self.model.eval().requires_grad_(False)
        trial = dry_run(self.model, attention)
        for use_kernel in (use_norm_kernel, use_gate_kernel, use_rotary_kernel):
            use_kernel(self.model, uses_kernels=uses_kernels)
        num_blocks = max_batch * (context // BLOCK + 1) + chunk // BLOCK
        attention.allocate(num_blocks * BLOCK, self.model.dtype, device)
        plans = [_plan(number, RANKS[number % len(RANKS)], trial) for number in range(num_adapters)]
        arena = Arena(max(sum(plan.size for plan in plans), 1), self.model.dtype, device)
        offset = 0
        for plan in plans:
            flat = torch.randn(plan.size, device=device).mul_(0.01).to(self.model.dtype)
            for _ in arena.write(offset, LoadedAdapter(plan, flat)):
                pass
            arena.publish(plan, offset)
            offset += plan.size
        self.adapters = [plan.adapter for plan in plans]
        self.runner = Runner(self.model, trial, attention, arena, num_blocks, BLOCK, uses_kernels=uses_kernels)

    @property
    def replays(self) -> bool:
        """Whether decodes are replayed, once they were captured; not after it has turned out impossible."""
        return self.runner.graphs is not None and self.runner.graphs.is_on

    @replays.setter
    def replays(self, wanted: bool) -> None:
        if self.runner.graphs is not None:
            self.runner.graphs.is_on = wanted

    @property
    def weight_bytes(self) -> int:
        """Of what every step reads: all but the embedding."""
        module: torch.nn.Module = self.model
        sizes = {name: p.numel() * p.element_size() for name, p in module.named_parameters()}
        return sum(size for name, size in sizes.items() if "embed_tokens" not in name)

    def decode(self, batch: int, adapters: list[Adapter]) -> Batch:
        width = self.context // BLOCK + 1
        return Batch(step=0, segments=tuple(
            Segment(_sequence(number, self.context, range(number * width, (number + 1) * width),
                              _nth(adapters, number)),
                    start=self.context - 1, num_tokens=1, samples=True)
            for number in range(batch)
        ))  # fmt: skip

    def prefill(self, adapters: list[Adapter]) -> Batch:
        sequence = _sequence(0, self.chunk, range(self.chunk // BLOCK), _nth(adapters, 0))
        return Batch(step=0, segments=(Segment(sequence, start=0, num_tokens=self.chunk, samples=True),))


def _nth(adapters: list[Adapter], number: int) -> Adapter | None:
    return adapters[number % len(adapters)] if adapters else None


def _plan(number: int, rank: int, trial: Trial) -> AdapterPlan:
    entries, end = {}, 0
    for _, module in trial.layers.values():
        if module.name != "lm_head":
            b = end + rank * module.in_features
            entries[module.index] = ModuleEntry(module, rank, 1.0, end, b, None)
            end = b + rank * module.out_features
    adapter = Adapter(id=str(number), name=str(number), path="")
    return AdapterPlan(adapter, _config(rank), entries, ExtraPlan((), (), {}, {}, {}, 0), end, tensors={})


@cache
def _config(rank: int) -> LoraConfig:
    with TemporaryDirectory() as directory:
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(TARGETS)}
        Path(directory, "adapter_config.json").write_text(json.dumps(config))
        return read_config(Path(directory))


def _sequence(number: int, length: int, blocks: range, adapter: Adapter | None) -> Sequence:
    draw = random.Random(number)
    request = GenerateRequest(
        request_id=str(number), prompt_token_ids=tuple(draw.choices(range(2, 1000), k=length)),
        sampling=SamplingParams(max_tokens=2, temperature=0.0), adapter=adapter,
    )  # fmt: skip
    sequence = Sequence(request=request, seed=0, eos_token_ids=frozenset(), arrival=0.0, max_len=length + 2)
    sequence.block_table = list(blocks)
    return sequence


def measure(
    world: World, shape: str, counts: list[int], floor: float, device: torch.device, rounds: int
) -> list[Figure]:
    figures = []

    def add(phase: str, batch: int, num_adapters: int, num_tokens: int, mixed: Batch, base: Batch) -> None:
        seconds, alone = (seconds_of(partial(world.runner.run, one), device, rounds) for one in (mixed, base))
        replayed = phase == "decode" and world.replays
        figures.append(Figure(shape, phase, batch, num_adapters, len(world.adapters), seconds * 1e3,
                              num_tokens / seconds, alone / seconds, seconds / floor, replayed))  # fmt: skip
        print(figures[-1], flush=True)

    def decodes(batch: int, count: int) -> None:
        mixed, base = world.decode(batch, world.adapters[:count]), world.decode(batch, [])
        could = world.replays
        world.replays = False
        add("decode", batch, count, batch, mixed, base)
        if not could:
            return
        world.replays = True
        for _ in range(MOST_STEPS + 2):  # until they are captured and checked
            world.runner.run(mixed)
            world.runner.run(base)
        if world.replays:
            add("decode", batch, count, batch, mixed, base)

    for batch in (1, 8):
        decodes(batch, 0)
    for count in counts:
        decodes(max(32, count), count)
    for count in (0, 1):
        add("prefill", 1, count, world.chunk, world.prefill(world.adapters[:count]), world.prefill([]))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--adapters", default="0,1,8,32,64,256", help="distinct ones in a step, separated by commas")
    parser.add_argument("--resident", type=int, default=0, help="adapters in the arena, if more than those in a step")
    parser.add_argument("--context", type=int, default=512, help="tokens of each decoded sequence")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of the prefill, whole blocks of 16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    if options.chunk % BLOCK:
        parser.error(f"--chunk {options.chunk} is not a multiple of {BLOCK}")
    logging.basicConfig()
    logging.getLogger("loraplex.engine").setLevel(logging.INFO)  # which says why steps are not replayed
    counts = [int(count) for count in options.adapters.split(",")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(
        options.shape, max(options.resident, *counts), max(32, *counts), device,
        uses_kernels=device.type == "cuda", context=options.context, chunk=options.chunk,
    )  # fmt: skip
    floor = world.weight_bytes / copy_bandwidth(device)
    figures = measure(world, options.shape, counts, floor, device, options.rounds)
    if options.json:
        options.json.write_text(json.dumps([asdict(figure) for figure in figures]))


if __name__ == "__main__":
    main()
