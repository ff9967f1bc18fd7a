"""transformers' own `generate` on one batch, with PEFT's `adapter_names` where adapters are given.

With `--continuous` its continuous batching instead, which knows no adapters; its manager lives on between the runs.

    python bench/peft_generate.py --base DIR --adapters DIR,DIR --requests 8 --prompt-tokens 30 --max-tokens 16

Reads one line from standard input before each run and writes `{"tokens": …, "seconds": …}` after it, so that
`compare.py` can alternate it with others. Without `--adapters`, the base model alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig


def sampling_of(temperature: float) -> dict[str, Any]:
    """Without transformers' own top-k, which the servers do not have."""
    return {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}


def generated(model: Any, ids: Tensor, max_tokens: int, **more: Any) -> int:
    """Tokens of one batch through `generate`; `ids` is [requests, prompt]."""
    length = {"max_new_tokens": max_tokens, "min_new_tokens": max_tokens}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length, **more)
    return int((out.shape[1] - ids.shape[1]) * ids.shape[0])


def continuously(model: Any, ids: Tensor, max_tokens: int, **sampling: Any) -> int:
    """The same through `generate_batch`, in the fastest of the settings that were tried on a CPU."""
    answers = model.generate_batch(
        ids.tolist(),
        generation_config=GenerationConfig(max_new_tokens=max_tokens, eos_token_id=-1, **sampling),  # type: ignore[no-untyped-call]
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=32, page_size=128),
        persistent_manager=True,
    )
    return sum(len(answer.generated_tokens) for answer in answers.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapters", default="", help="directories, separated by commas")
    parser.add_argument("--continuous", action="store_true")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=30)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(options.base, dtype="auto")
    adapters = [path for path in options.adapters.split(",") if path]
    sampling, more = sampling_of(options.temperature), dict[str, Any]()
    if adapters:
        model = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
        for number, path in enumerate(adapters[1:], start=1):
            model.load_adapter(path, adapter_name=str(number))
        more["adapter_names"] = [str(number % len(adapters)) for number in range(options.requests)]
    model.train(False)
    print(json.dumps({"ready": True}), flush=True)
    generator = torch.Generator().manual_seed(0)
    for _ in sys.stdin:
        ids = torch.randint(10, 2000, (options.requests, options.prompt_tokens), generator=generator)
        began = time.perf_counter()
        with torch.inference_mode():
            if options.continuous:
                tokens = continuously(model, ids, options.max_tokens, **sampling)
            else:
                tokens = generated(model, ids, options.max_tokens, **sampling, **more)
        print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
