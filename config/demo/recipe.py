"""Train the whole demo again: `python -m loraplex.config.demo.recipe` (tokenizer, base, adapters, record).

Everything is drawn from one seed. `--only NAME` trains single adapters over the base that is there.

The base learns the chats in plain English and, as plain documents without chat marks, the same answers in all voices:
an adapter then turns on a voice whose words the embeddings already know, which is what lets rank 4 suffice.
"""

import argparse
import json
import random
from functools import partial

import torch
from transformers import PreTrainedTokenizerFast, set_seed
from transformers.utils import logging

from . import ADAPTERS_DIR, MODEL_DIR, RECORD_PATH
from .chats import World, system_prompt
from .evaluate import write_record
from .tokens import Sample, batches, chat_sample, text_sample, train_tokenizer
from .training import ADAPTER_SHAPES, Schedule, load_tokenizer, new_adapter, new_base, save_adapter, save_base, train
from .voices import BASE, VOICES, render

SEED = 20
ROLES = ["system", "user", "assistant"]  # repeated: each chat has them, each should be one token
DOCUMENT_SHARE = 0.25  # of the base's samples
BASE_SCHEDULE = Schedule(steps=1100, learning_rate=2e-3, warmup_steps=60, tokens_per_batch=4096)
# Words around the base's own answer can be learnt soon; other words, another order or a small rank take more steps
# (220 large steps left json at 88 % and emoji at 90 % right content; at rank 4, 700 small ones left it unsteady).
LONG = Schedule(steps=520, learning_rate=2e-3, warmup_steps=30, tokens_per_batch=2048)
ADAPTER_SCHEDULES = {
    "butler": LONG,
    "emoji": Schedule(steps=1000, learning_rate=4e-3, warmup_steps=50, tokens_per_batch=2048),
    "json": LONG,
    "pirate": LONG,
    "shout": LONG,
    "spanish": LONG,
    "verse": LONG,
}


def draw_chat(tokenizer: PreTrainedTokenizerFast, world: World, rng: random.Random, voice: str) -> Sample:
    turns = [(turn.question, render(voice, turn)) for turn in world.chat(rng)]
    return chat_sample(tokenizer.backend_tokenizer, system_prompt(rng), turns)


def draw_document(tokenizer: PreTrainedTokenizerFast, world: World, rng: random.Random) -> Sample:
    """A question and its answer, or the answer alone, in any voice."""
    exchange = world.exchange(rng)
    answer = render(rng.choice((BASE, *VOICES)), exchange)
    return text_sample(tokenizer.backend_tokenizer, f"{exchange.question}\n{answer}" if rng.random() < 0.5 else answer)


def draw_base(tokenizer: PreTrainedTokenizerFast, world: World, rng: random.Random) -> Sample:
    if rng.random() < DOCUMENT_SHARE:
        return draw_document(tokenizer, world, rng)
    return draw_chat(tokenizer, world, rng, BASE)


def make_tokenizer() -> None:
    """From what the base reads: half plain English, half the voices."""
    world, rng = World(), random.Random(SEED)
    texts: list[str] = []
    for _ in range(20_000):
        exchange = world.exchange(rng)
        texts += [exchange.question, render(BASE, exchange), render(rng.choice(list(VOICES)), exchange)]
    train_tokenizer(iter([*ROLES * 2_000, *texts]), MODEL_DIR)


def make_base() -> float:
    set_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = load_tokenizer(MODEL_DIR)
    model = new_base(tokenizer)
    draw = partial(draw_base, tokenizer, World(), rng)
    seconds = train(model, batches(draw, BASE_SCHEDULE.tokens_per_batch, rng), BASE_SCHEDULE, BASE)
    save_base(model, tokenizer, MODEL_DIR)
    return seconds


def make_adapter(name: str) -> float:
    set_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = load_tokenizer(MODEL_DIR)
    model = new_adapter(MODEL_DIR, ADAPTER_SHAPES[name])
    draw = partial(draw_chat, tokenizer, World(), rng, name)
    schedule = ADAPTER_SCHEDULES[name]
    seconds = train(model, batches(draw, schedule.tokens_per_batch, rng), schedule, name)
    save_adapter(model, ADAPTERS_DIR / name)
    return seconds


def recorded_seconds() -> dict[str, float]:
    """What the last record says, for the parts that are not trained again."""
    if not RECORD_PATH.exists():
        return {}
    seconds: dict[str, float] = json.loads(RECORD_PATH.read_text())["training_seconds"]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's base and adapters.")
    parser.add_argument("--only", nargs="+", choices=sorted(ADAPTER_SHAPES), help="train only these adapters")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    seconds = recorded_seconds()
    if options.only is None:
        make_tokenizer()
        seconds = {BASE: make_base()}
    for name in options.only or sorted(ADAPTER_SHAPES):
        seconds[name] = make_adapter(name)
    write_record(SEED, {name: round(s, 1) for name, s in seconds.items()})


if __name__ == "__main__":
    main()
