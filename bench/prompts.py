"""How long a prompt takes to its first token, beside the same prompt in transformers, and with an adapter beside PEFT.

    python bench/prompts.py --shape 135m --tokens 128,512,1000,4000 --rank 16

Each in turn, `--rounds` times: the engine alone, without process or gateway, computes a random prompt in steps of
`--chunk` tokens; transformers one forward pass over as many tokens, that keeps its keys and values and gives the last
token's logits; then both with a LoRA of `--rank` on all linear layers (0: without). Medians of seconds, and how many
times as long ours takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from long_prompt import Bench
from peft import PeftModel
from shapes import SHAPES, make_adapter, make_base
from transformers import AutoModelForCausalLM

from loraplex.engines.protocol import Adapter


def step_seconds(bench: Bench, num_tokens: int, adapter: Adapter | None) -> float:
    """Of a prompt in the engine, up to its first token."""
    return sum(bench.steps(until=bench.submit(num_tokens, 1, adapter=adapter)))


@torch.inference_mode()
def pass_seconds(model: Any, num_tokens: int) -> float:
    """Of one forward pass over the prompt."""
    ids = torch.randint(10, 2000, (1, num_tokens))
    began = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    parser.add_argument("--tokens", default="128,512,1000,2000,4000", help="of each prompt, separated by commas")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=512, help="the token budget of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--models", type=Path, default=Path("/tmp/loraplex-bench"), help="where the weights are kept")
    options = parser.parse_args()
    bench = Bench(argparse.Namespace(**vars(options), kv_mib=512, streams=1))
    path = make_base(options.shape, options.models)
    ways: dict[str, tuple[Adapter | None, Any]] = {
        "base": (None, AutoModelForCausalLM.from_pretrained(path, dtype="auto"))
    }
    if options.rank:
        made = make_adapter(options.shape, options.rank, 0, options.models)
        other = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        ways["adapter"] = (made, PeftModel.from_pretrained(other, made.path))
    for _, model in ways.values():
        model.train(False)
    lengths = [int(number) for number in options.tokens.split(",")]
    ours, theirs = defaultdict[Any, list[float]](list), defaultdict[Any, list[float]](list)
    for number in range(options.rounds + 1):
        for length in lengths:
            for name, (adapter, model) in ways.items():
                took, took_there = step_seconds(bench, length, adapter), pass_seconds(model, length)
                if number:  # the first round warms up
                    ours[name, length].append(took)
                    theirs[name, length].append(took_there)
    assert bench.core.stats().total_cached_prompt_tokens == 0
    print(f"{options.shape}, {torch.get_num_threads()} threads, chunks of {options.chunk}")
    for name, length in ours:
        mine, there = statistics.median(ours[name, length]), statistics.median(theirs[name, length])
        print(f"  {name:8} {length:6} tokens  ours {mine * 1e3:9.1f} ms  theirs {there * 1e3:9.1f} ms  "
              f"ratio {mine / there:5.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
