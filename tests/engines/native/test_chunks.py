"""Chunks of prompts are attended by whoever was faster at start; what comes out is what PEFT gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.core import make_core, prompt_of, request, run, tokens
from support.worlds import SmallWorld

from loraplex.engines.native import attention, chunks
from loraplex.kernels.attention.cpu_prefill import PrefillRuns, is_available

pytestmark = pytest.mark.skipif(
    not is_available(torch.float32, torch.device("cpu"), 1, 1), reason="the kernel was not built: no compiler"
)


@pytest.mark.parametrize("is_faster", [True, False])
def test_prompts_in_chunks_beside_decodes_give_the_tokens_of_peft(
    small: SmallWorld, is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    attend = PrefillRuns.attend

    def counted(self: PrefillRuns, *arguments: Any) -> None:
        runs.append(len(self._runs))
        attend(self, *arguments)

    monkeypatch.setattr(attention, "is_faster", lambda *_: is_faster)
    monkeypatch.setattr(PrefillRuns, "attend", counted)
    core = make_core(small, max_batch_tokens=180)
    adapters = [None, *small.adapters.values()]
    prompts = [prompt_of(seed, 70 + seed) for seed in range(len(adapters))]
    for number, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        core.submit(request(str(number), prompt, adapter, max_tokens=8))
    emissions = run(core)
    for number, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        assert tokens(emissions[str(number)]) == small.oracle.greedy(prompt, 8, adapter), adapter
    assert bool(runs) is is_faster
    assert not is_faster or max(runs) > 1


@pytest.mark.parametrize(("ours", "expected"), [(0.001, True), (0.1, False)])
def test_who_is_faster_is_taken(ours: float, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are run; what they took is told here."""
    seconds = iter([ours, 0.01])
    found: list[Any] = []

    def told(run: Callable[[], Any]) -> float:
        found.append(run())
        return next(seconds)

    monkeypatch.setattr(chunks, "least_seconds", told)
    assert chunks.is_faster(2, 16, 8, torch.float32) is expected
    assert found[0] is None
    assert found[1].shape == (1, 8, 128, 8)
