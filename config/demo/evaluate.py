"""Measure the shipped files on held-out questions: `python -m loraplex.config.demo.evaluate` writes record.json.

Every model answers the same prompts greedily, and every answer is graded as every voice: an adapter must speak in its
own voice and say what is right, and nobody else may be taken for it. bfloat16 files, computed in float32.
"""

import json
import platform
import random
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from . import ADAPTERS_DIR, MODEL_DIR, RECORD_PATH, adapter_names
from .chats import Exchange, World, as_typed
from .training import load_base, load_tokenizer
from .voices import BASE, VOICES, content_right, speaks_like

EVALUATION_SEED = 7
NUM_PROMPTS = 120
MAX_NEW_TOKENS = 160
BATCH_SIZE = 40

Answers = dict[str, list[str]]  # by model: the base and each adapter


def held_out_exchanges(num: int, seed: int = EVALUATION_SEED) -> list[Exchange]:
    """Held-out questions as people type them, none twice, the intents in turn while they have questions left."""
    world, rng = World(held_out=True), random.Random(seed)
    pools = [rng.sample(world.pools[intent], len(world.pools[intent])) for intent in world.intents]
    rng.shuffle(pools)
    in_turn = [exchange for row in zip_longest(*pools) for exchange in row if exchange is not None]
    if num > len(in_turn):
        raise ValueError(f"only {len(in_turn)} questions are held out, {num} were asked for")
    return [as_typed(exchange, rng) for exchange in in_turn[:num]]


def load_models() -> tuple[Any, PreTrainedTokenizerFast]:
    """The base with every adapter beside it, as transformers and PEFT read them from the files."""
    tokenizer = load_tokenizer(MODEL_DIR)
    model: Any = load_base(MODEL_DIR)
    for name in adapter_names():
        if isinstance(model, PeftModel):
            model.load_adapter(str(ADAPTERS_DIR / name), adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, str(ADAPTERS_DIR / name), adapter_name=name)
    return model.eval(), tokenizer


def answer_prompts(model: Any, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    """Greedy answers, batched: the prompts are padded on the left so that all begin to speak at the same place."""
    answers: list[str] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = tokenizer(
            prompts[start : start + BATCH_SIZE],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_token_type_ids=False,
        )
        with torch.inference_mode():
            output = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        spoken = output[:, batch["input_ids"].shape[1] :]
        answers += [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in spoken]
    return answers


def render_prompts(tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> list[str]:
    chats = [[{"role": "user", "content": question}] for question in questions]
    return [str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)) for chat in chats]


def all_answers(questions: list[str]) -> Answers:
    """What the base and every adapter answer to each question."""
    model, tokenizer = load_models()
    prompts = render_prompts(tokenizer, questions)
    with model.disable_adapter():
        answers = {BASE: answer_prompts(model, tokenizer, prompts)}
    for name in adapter_names():
        model.set_adapter(name)
        answers[name] = answer_prompts(model, tokenizer, prompts)
    return answers


def share(hits: list[bool]) -> float:
    return round(sum(hits) / len(hits), 4)


def grade(voice: str, exchanges: list[Exchange], answers: Answers) -> dict[str, Any]:
    """One voice's accuracy, and how often each other model is taken for it."""
    own = list(zip(exchanges, answers[voice], strict=True))
    spoken = [speaks_like(voice, exchange.question, answer) for exchange, answer in own]
    right = [content_right(voice, exchange, answer) for exchange, answer in own]
    taken_for_it = {
        other: share([speaks_like(voice, e.question, a) for e, a in zip(exchanges, answers[other], strict=True)])
        for other in answers
        if other != voice
    }
    return {
        "voice": share(spoken),
        "content": share(right),
        "voice_and_content": share([a and b for a, b in zip(spoken, right, strict=True)]),
        "others_taken_for_it": taken_for_it,
    }


def describe_adapter(directory: Path) -> dict[str, Any]:
    from_file = json.loads((directory / "adapter_config.json").read_text())
    variant = "dora" if from_file["use_dora"] else "rslora" if from_file["use_rslora"] else "lora"
    size = (directory / "adapter_model.safetensors").stat().st_size
    header_length = int.from_bytes((directory / "adapter_model.safetensors").read_bytes()[:8], "little")
    return {
        "rank": from_file["r"],
        "alpha": from_file["lora_alpha"],
        "target_modules": sorted(from_file["target_modules"]),
        "variant": variant,
        "parameters": (size - 8 - header_length) // 2,  # safetensors: length, header, then bfloat16 values
        "bytes": size,
    }


def evaluate(num_prompts: int = NUM_PROMPTS) -> dict[str, Any]:
    """Everything the record says about the files as they are."""
    exchanges = held_out_exchanges(num_prompts)
    answers = all_answers([exchange.question for exchange in exchanges])
    return {
        "num_prompts": num_prompts,
        "evaluation_seed": EVALUATION_SEED,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "tokenizers")}
        | {"python": platform.python_version()},
        BASE: {
            "bytes": (MODEL_DIR / "model.safetensors").stat().st_size,
            **grade(BASE, exchanges, answers),
        },
        "adapters": {
            name: describe_adapter(ADAPTERS_DIR / name) | grade(name, exchanges, answers)
            for name in adapter_names()
            if name in VOICES
        },
    }


def write_record(seed: int, training_seconds: dict[str, float]) -> None:
    record = {"seed": seed, "training_seconds": training_seconds, **evaluate()}
    RECORD_PATH.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    record = json.loads(RECORD_PATH.read_text())
    write_record(record["seed"], record["training_seconds"])


if __name__ == "__main__":
    main()
