"""Results that do not depend on company, to the last bit (`engine.deterministic`).

The order in which a kernel adds up one row's numbers depends on the shapes it is called with, so a request's logits
differ in their last bits with whoever shares its batch. With a tile every forward pass has the same number of tokens,
padded, whatever the step; attention and LoRA, whose shapes cannot be fixed, take each token by itself, or are computed
by kernels that give a token the same bits in any company; and what is left, whether a row's place in the tile or its
neighbours make a difference, is tried out here at start.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.engines.adapters.peft import UNUSED
from loraplex.engines.native.batch import Batch, Segment
from loraplex.engines.native.model import Trial, ordinary_token_ids
from loraplex.engines.native.reference import plain_sequence
from loraplex.engines.native.runner import Runner

# From the most tokens that may share a pass over the weights to one, which cannot fail.
_TILES = (16, 8, 4, 2)
_NUM_EXTRA_TRIALS = 16


def choose_tile(model: PreTrainedModel, trial: Trial, runner: Runner, block_size: int, num_blocks: int) -> int:
    """The largest tile in which each row is computed as everywhere else.

    Where linear layers see something else than each token's row, as in a mixture of experts of its own making, what a
    token gets may depend on its neighbours in rare cases only: then it has none.
    """
    if any(reason != UNUSED for reason in trial.unfit.values()):
        return 1
    trials = [
        Segment(
            sequence=plain_sequence([token_id] * block_size, range(block, block + 1)),
            start=block % block_size,
            num_tokens=1,
            samples=True,
        )
        for block, token_id in enumerate(ordinary_token_ids(model).tolist()[:num_blocks])
    ]
    for tile in _TILES:
        runner.tile = tile
        if len(trials) >= tile and _rows_are_independent(runner, trials, tile):
            return tile
    return 1


def _rows_are_independent(runner: Runner, trials: list[Segment], tile: int) -> bool:
    """Whether tokens, each in a block of its own, give the same bits in random places beside random others."""
    draw = random.Random(tile)
    known: dict[int, Tensor] = {}
    for _ in range(tile + _NUM_EXTRA_TRIALS):
        count = draw.choice([tile, tile, draw.randint(1, tile)])
        chosen = tuple(draw.sample(trials, count))
        for segment, logits in zip(chosen, runner.logits(Batch(step=0, segments=chosen)), strict=True):
            if not torch.equal(known.setdefault(segment.sequence.block_table[0], logits), logits):
                return False
    return True
