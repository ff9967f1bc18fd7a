"""What is to be merged, and how: the words between the store and the process that computes it (`merge.py`)."""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

Strategy = Literal["ties", "dare_linear", "dare_ties"]
SignMethod = Literal["total", "frequency"]
_FORMAT = 1  # raised when the same recipe is to give other files


class MergePart(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter: its content, where its files are, and how much it counts."""

    adapter_id: str
    path: str
    weight: float


class MergeRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """`density` is the share of each part's weights that is kept; `max_rank` bounds what comes out."""

    parts: tuple[MergePart, ...]
    strategy: Strategy
    density: float
    sign_method: SignMethod
    max_rank: int

    @property
    def id(self) -> str:
        """A hash of everything that the result depends on; where files lie is no part of it."""
        parts = [[part.adapter_id, part.weight] for part in self.parts]
        said = [_FORMAT, parts, self.strategy, self.density, self.sign_method, self.max_rank]
        return hashlib.sha256(msgspec.json.encode(said)).hexdigest()

    @property
    def seed(self) -> int:
        """Chance is the recipe's own, so that the same recipe gives the same files."""
        return int(self.id[:15], 16)
