"""transformers' own `generate` on one batch, with PEFT's `adapter_names` where adapters are given.

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
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapters", default="", help="directories, separated by commas")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=30)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(options.base, dtype="auto")
    adapters = [path for path in options.adapters.split(",") if path]
    more: dict[str, Any] = {}
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
            out: Any = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=options.max_tokens,
                min_new_tokens=options.max_tokens,
                do_sample=False,
                **more,
            )
        seconds = time.perf_counter() - began
        print(json.dumps({"tokens": (out.shape[1] - ids.shape[1]) * options.requests, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
