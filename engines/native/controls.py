"""What a request excludes and prefers, made ready once for all of its steps."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from loraplex.engines.protocol import SamplingParams

_MAX_KEPT = 512  # as many answers as run at once, and then some


class Controls:
    """Of one request's sampling."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._others: Tensor | None = None
        self._bias: tuple[Tensor, Tensor] | None = None

    def bias(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that are biased, and by how much, where these logits are. logits: Shape [V]."""
        if self._bias is None:
            tokens, values = list(self.params.logit_bias), list(self.params.logit_bias.values())
            self._bias = torch.tensor(tokens, device=logits.device), logits.new_tensor(values)
        return self._bias

    def others(self, logits: Tensor) -> Tensor:
        """Which tokens are not among those that are allowed. logits: Shape [V]."""
        if self._others is None:
            self._others = torch.ones_like(logits, dtype=torch.bool)
            self._others[torch.tensor(self.params.allowed_token_ids, device=logits.device)] = False
        return self._others

    def completing(self, token_ids: Sequence[int]) -> set[int]:
        """The tokens that would complete a bad word behind these, as transformers' NoBadWordsLogitsProcessor has it."""
        single, longer = self._words
        last = token_ids[-1] if token_ids else None
        found = {word[-1] for word in longer.get(last, ()) if tuple(token_ids[1 - len(word) :]) == word[:-1]}
        return single | found if found else single

    @cached_property
    def _words(self) -> tuple[set[int], dict[int | None, list[tuple[int, ...]]]]:
        """Words of one token, and the others by their last token but one."""
        single = {word[0] for word in self.params.bad_words_ids if len(word) == 1}
        longer: dict[int | None, list[tuple[int, ...]]] = defaultdict(list)
        for word in self.params.bad_words_ids:
            if len(word) > 1:
                longer[word[-2]].append(word)
        return single, dict(longer)


_known: OrderedDict[int, Controls] = OrderedDict()


def controls_of(params: SamplingParams) -> Controls:
    """Known by the object: one request's steps all have the same. For one thread."""
    key = id(params)  # which is of no other as long as the controls hold it
    if (known := _known.get(key)) is None:
        known = _known[key] = Controls(params)
        if len(_known) > _MAX_KEPT:
            _known.popitem(last=False)
    else:
        _known.move_to_end(key)
    return known
