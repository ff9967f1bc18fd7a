"""Text to tokens: the byte-level tokenizer, its chat template, and padded batches whose loss is the answers' tokens.

`prompt_text` writes by hand what the chat template renders (a test holds them together): training needs the borders
between prompt and answer, which a rendered template no longer shows.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, START, END = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCABULARY_SIZE = 1536
MAX_POSITIONS = 2048
IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """A chat as tokens; labels are the tokens to learn, IGNORED where only the context is given."""

    tokens: list[int]
    labels: list[int]


Batch = dict[str, torch.Tensor]


def train_tokenizer(texts: Iterator[str], directory: Path) -> None:
    """Byte-level BPE: all 256 bytes are in the alphabet, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, BOS, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        extra_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(str(directory))


def prompt_text(system: str | None, history: list[tuple[str, str]], question: str) -> str:
    """The rendered chat up to the point at which the assistant speaks."""
    turns = [("system", system)] if system is not None else []
    for asked, answered in history:
        turns += [("user", asked), ("assistant", answered)]
    rendered = "".join(f"{START}{role}\n{text}{END}\n" for role, text in [*turns, ("user", question)])
    return f"{BOS}{rendered}{START}assistant\n"


def chat_sample(tokenizer: Tokenizer, system: str | None, turns: list[tuple[str, str]]) -> Sample:
    """A whole chat; only what the assistant says, its end token included, is learnt."""
    tokens: list[int] = []
    labels: list[int] = []
    text = prompt_text(system, [], turns[0][0])
    for index, (question, answer) in enumerate(turns):
        if index:
            text = f"\n{START}user\n{question}{END}\n{START}assistant\n"
        prompt = tokenizer.encode(text).ids
        spoken = tokenizer.encode(answer + END).ids
        tokens += prompt + spoken
        labels += [IGNORED] * len(prompt) + spoken
    return Sample(tokens, labels)


def text_sample(tokenizer: Tokenizer, text: str) -> Sample:
    """A plain document, learnt whole."""
    tokens = tokenizer.encode(f"{BOS}{text}{END}").ids
    return Sample(tokens, tokens)


def pad(samples: list[Sample]) -> Batch:
    length = max(len(sample.tokens) for sample in samples)
    return {
        "input_ids": torch.tensor([s.tokens + [0] * (length - len(s.tokens)) for s in samples]),
        "attention_mask": torch.tensor([[1] * len(s.tokens) + [0] * (length - len(s.tokens)) for s in samples]),
        "labels": torch.tensor([s.labels + [IGNORED] * (length - len(s.labels)) for s in samples]),
    }


def batches(draw: Callable[[], Sample], tokens_per_batch: int, rng: random.Random) -> Iterator[Batch]:
    """Endless batches of at most `tokens_per_batch` padded tokens; samples of like length go together."""
    while True:
        pool = sorted((draw() for _ in range(2048)), key=lambda sample: len(sample.tokens))
        groups: list[list[Sample]] = [[]]
        for sample in pool:
            if (len(groups[-1]) + 1) * len(sample.tokens) > tokens_per_batch:
                groups.append([])
            groups[-1].append(sample)
        rng.shuffle(groups)
        yield from (pad(group) for group in groups if group)
