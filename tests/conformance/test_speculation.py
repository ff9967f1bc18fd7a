"""Drafts change no token, on every architecture that is served: what a wrong draft left in the cache reaches nobody.

python -m pytest -m "slow or not slow" tests/conformance/test_speculation.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conformance.cells import make_base, make_core
from conformance.features import Feature, attention_only, make_feature_adapter
from conformance.matrix import read_record
from conformance.shrinking import tiny_config
from support.core import prompt_of, request, run, tokens

from loraplex.engines.native.drafting import Drafter, StepCosts
from loraplex.engines.native.sequence import Sequence
from loraplex.engines.protocol import Adapter
from loraplex.engines.stats import EngineStats

SERVED = [name for name, row in read_record().rows.items() if "refused" not in row]
# Computed in every run: plain attention, windows beside whole layers, latent attention, experts with sinks.
SAMPLE = {"llama", "gemma2", "deepseek_v3", "gpt_oss"}
# Repeat themselves so little that what preemptions compute again outweighs what drafts save.
HARDLY_REPEAT = {"modernbert-decoder", "sarvam_moe"}
RECURRING = dict.fromkeys(range(10, 14), 8.0)  # towards four tokens, so that n-grams occur again


@pytest.fixture(autouse=True)
def drafts_are_forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Made however long steps take here; and most have one token changed, so that they are wrong from there."""
    propose = Drafter.propose

    def spoilt(self: Drafter, sequence: Sequence, room: int, num_in_step: int) -> tuple[int, ...]:
        drafts, place = [*propose(self, sequence, room, num_in_step)], sequence.num_generated % 4
        if place < min(len(drafts), 3):
            drafts[place] = 3 + drafts[place] % 100
        return tuple(drafts)

    monkeypatch.setattr(StepCosts, "seconds", lambda self, num_tokens: None)
    monkeypatch.setattr(Drafter, "propose", spoilt)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def answers_of(base: Path, adapter: Adapter, max_draft_tokens: int) -> tuple[dict[str, list[int]], EngineStats, int]:
    """Greedy, to prompts that repeat themselves, of base and adapter in one batch; blocks are so few that some wait.

    And how many steps they took, the adapter being there.
    """
    core = make_core(base, num_blocks=30, max_draft_tokens=max_draft_tokens)
    try:
        core.submit(request("first", [3, 4, 5], adapter, max_tokens=1))
        run(core)
        num_before = core.stats().num_steps
        for number in range(4):
            prompt = [3 + token % 100 for token in prompt_of(number, 5)] * 4
            wanted = request(
                str(number), prompt, adapter if number % 2 else None, max_tokens=32, ignore_eos=True,
                logit_bias=RECURRING if number < 2 else {},
            )  # fmt: skip
            core.submit(wanted)
        emissions = run(core)
        assert [found[-1].error for found in emissions.values()] == [None] * 4
        stats = core.stats()
        return {name: tokens(found) for name, found in emissions.items()}, stats, stats.num_steps - num_before
    finally:
        core.adapters.close()


@pytest.mark.filterwarnings("ignore")  # of transformers, about configurations this small
@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in SERVED]
)
def test_greedy_answers_do_not_depend_on_drafts(architecture: str, tmp_path: Path) -> None:
    make_base(tiny_config(architecture), tmp_path / "base")
    adapter = make_feature_adapter(
        tmp_path / "base", Feature("lora", options=attention_only), tmp_path / "lora"
    ).adapter
    plain, without, num_without = answers_of(tmp_path / "base", adapter, 0)
    drafted, stats, num_steps = answers_of(tmp_path / "base", adapter, 8)
    assert drafted == plain
    assert {name: len(answer) for name, answer in plain.items()} == dict.fromkeys("0123", 32)
    assert without.total_draft_tokens == 0
    assert min(without.total_preemptions, stats.total_preemptions) > 0
    assert 0 < stats.total_accepted_draft_tokens < stats.total_draft_tokens
    if architecture not in HARDLY_REPEAT:
        assert num_steps < num_without


def test_sample_is_served() -> None:
    assert set(SERVED) >= SAMPLE | HARDLY_REPEAT
