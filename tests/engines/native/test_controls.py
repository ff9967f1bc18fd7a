"""What a request excludes and prefers is made ready once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.core import make_core, prompt_of, request, run, tokens
from support.worlds import SmallWorld

from loraplex.engines.native import controls as controls_module
from loraplex.engines.native.controls import Controls, controls_of
from loraplex.engines.protocol import SamplingParams

TOKENS = st.integers(0, 3)
WORDS = st.lists(st.lists(TOKENS, min_size=1, max_size=4).map(tuple), max_size=6)


@given(WORDS, st.lists(TOKENS, max_size=8))
def test_words_are_completed_by_their_last_token(words: list[tuple[int, ...]], text: list[int]) -> None:
    found = Controls(SamplingParams(max_tokens=1, bad_words_ids=tuple(words))).completing(text)
    assert found == {token for token in range(4) for word in words if tuple([*text, token][-len(word) :]) == word}


def test_controls_belong_to_one_request_for_all_of_its_steps() -> None:
    params = [SamplingParams(max_tokens=1, logit_bias={5: 1.5}) for _ in range(2)]
    first = controls_of(params[0])
    assert controls_of(params[0]) is first
    assert controls_of(params[1]) is not first
    logits = torch.zeros(8)
    assert first.bias(logits) is first.bias(logits)
    for _ in range(3 * controls_module._MAX_KEPT):
        controls_of(SamplingParams(max_tokens=1))
    assert len(controls_module._known) == controls_module._MAX_KEPT
    assert controls_of(params[0]) is not first


def test_tensors_are_made_once_an_answer(small: SmallWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def tensor(values: object, **named: Any) -> torch.Tensor:
        made.append(values)
        return torch.tensor(values, **named)

    watched = SimpleNamespace(tensor=tensor, ones_like=torch.ones_like, bool=torch.bool)
    monkeypatch.setattr(controls_module, "torch", watched)
    core = make_core(small)
    allowed = tuple(range(100, 140))
    core.submit(request("a", prompt_of(1, 5), allowed_token_ids=allowed, logit_bias={101: 2.0}, max_tokens=10,
                        ignore_eos=True))  # fmt: skip
    answer = tokens(run(core)["a"])
    assert len(answer) == 10
    assert set(answer) <= set(allowed)
    assert made == [[101], allowed]
