"""Replayed steps against the model itself, to the last bit; which steps are replayed, and what if one differs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from support.core import make_core, prompt_of, request, run, tokens
from support.worlds import SmallWorld
from torch import nn

from loraplex.engines.native import step_graphs
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.cpu_replays import MOST_TOKENS
from loraplex.engines.native.drafting import Drafter
from loraplex.engines.native.scheduler import Emission
from loraplex.kernels.calls import is_available

pytestmark = pytest.mark.skipif(not is_available(), reason="the kernels were not built: no compiler")

PLAIN = ["rank-4", "rank-8", "rank-16-rslora", "rank-64-mlp"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a kind are captured when the second one comes."""
    for bound in ("FEWEST_STEPS", "MOST_STEPS"):
        monkeypatch.setattr(step_graphs, bound, 1)


class Forwards:
    """How often the model itself was called."""

    def __init__(self, core: EngineCore) -> None:
        self.num = 0
        model: nn.Module = core._machine.runner._model
        model.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: Any) -> None:
        self.num += 1


def logprobs(emissions: list[Emission]) -> list[Any]:
    return [emission.sampled.logprobs for emission in emissions if emission.sampled is not None]


def traffic(core: EngineCore, small: SmallWorld, names: list[str | None], **sampling: Any) -> dict[str, list[Emission]]:
    """Requests of several lengths, so that they come and go: every number of tokens a step from all of them to one."""
    for number, name in enumerate(names):
        adapter = None if name is None else small.adapters[name]
        length = 6 + 3 * number
        core.submit(
            request(str(number), prompt_of(number, 9), adapter, max_tokens=length, num_logprobs=3, ignore_eos=True,
                    **sampling)
        )  # fmt: skip
    return run(core)


@pytest.mark.parametrize("names", [[None] * 5, [*PLAIN, None], PLAIN * 2], ids=["base", "mixed", "adapters"])
@pytest.mark.parametrize("threads", [1, 2])
def test_replayed_steps_give_the_bits_of_the_model(
    small: SmallWorld, monkeypatch: pytest.MonkeyPatch, names: list[str | None], threads: int
) -> None:
    """By one engine with the same prompts in its cache: which layers our kernel computes is measured at its start.

    Each step has a graph of its own: where there are tile registers, up to three rows are computed otherwise than more.
    """
    monkeypatch.setattr(step_graphs, "MOST_PADDING", 0)
    core = make_core(small, max_draft_tokens=0, num_threads=threads)
    graphs = core._machine.runner.graphs
    assert graphs is not None
    graphs.is_on = False
    for _ in range(2):
        expected = traffic(core, small, names)
    graphs.is_on = True
    for _ in range(4):  # as it is, captured, checked, replayed
        found = traffic(core, small, names)
        for number in expected:
            assert tokens(found[number]) == tokens(expected[number])
            assert logprobs(found[number]) == logprobs(expected[number])
    forwards = Forwards(core)
    traffic(core, small, names)
    assert forwards.num <= 2 * len(names)  # for prompts, which come as their adapters do


def test_drafts_are_replayed_too(small: SmallWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strong bias makes the answer a run of one token, which every draft foresees, whatever steps cost here."""
    monkeypatch.setattr(Drafter, "time", lambda self, batch, seconds: None)
    core = make_core(small)
    for number in range(4):
        adapter = small.adapters["rank-8"]
        core.submit(
            request(str(number), prompt_of(1, 6), adapter, max_tokens=60, ignore_eos=True, logit_bias={7: 100.0})
        )
        assert tokens(run(core)[str(number)]) == [7] * 60
    graphs = core._machine.runner.graphs
    assert graphs is not None
    assert graphs.is_on
    assert max(kind.num_tokens for kind in graphs._graphs) > 1


def test_one_graph_serves_all_sets_of_adapters_as_they_are_evicted(small: SmallWorld) -> None:
    core = make_core(small, max_draft_tokens=0)
    for round_ in range(3):
        for name in PLAIN:
            core.submit(request(name, prompt_of(7, 12), small.adapters[name], max_tokens=8))
            assert tokens(run(core)[name]) == small.oracle.greedy(prompt_of(7, 12), 8, small.adapters[name]), round_
            core.adapters.unload(small.adapters[name].id)
    graphs = core._machine.runner.graphs
    assert graphs is not None
    assert [captured.checked for kind, captured in graphs._graphs.items() if kind.num_tokens == 1] == [{True}]


def test_one_graph_serves_the_base_and_adapters_once_each_was_checked(small: SmallWorld) -> None:
    core = make_core(small, max_draft_tokens=0)
    graphs = core._machine.runner.graphs
    assert graphs is not None
    for name, checked in ((None, {False}), ("rank-8", {False, True}), (None, {False, True})):
        adapter = None if name is None else small.adapters[name]
        core.submit(request("one", prompt_of(7, 12), adapter, max_tokens=8))
        assert tokens(run(core)["one"]) == small.oracle.greedy(prompt_of(7, 12), 8, adapter)
        assert [captured.checked for kind, captured in graphs._graphs.items() if kind.num_tokens == 1] == [checked]
    forwards = Forwards(core)
    for name in (None, "rank-8"):
        adapter = None if name is None else small.adapters[name]
        core.submit(request("one", prompt_of(7, 12), adapter, max_tokens=8))
        assert tokens(run(core)["one"]) == small.oracle.greedy(prompt_of(7, 12), 8, adapter)
    assert forwards.num <= 2  # for prompts


def test_short_prompts_are_replayed_too(small: SmallWorld) -> None:
    """Where they begin and what was in the cache differs; long ones, and all of one that looks far back, are not."""
    core = make_core(small, max_draft_tokens=0, kv_block_size=4)
    prompts = [prompt_of(seed, 24) for seed in range(5)]
    forwards = Forwards(core)
    for number, prompt in enumerate(prompts):
        core.submit(request(str(number), prompt, small.adapters["rank-8"], max_tokens=1))
        assert tokens(run(core)[str(number)]) == small.oracle.greedy(prompt, 1, small.adapters["rank-8"])
    assert forwards.num == 3  # as it is, captured, checked
    for number, prompt in enumerate(prompts):
        core.submit(request(str(number), prompt * 6, small.adapters["rank-8"], max_tokens=1))
        assert tokens(run(core)[str(number)]) == small.oracle.greedy(prompt * 6, 1, small.adapters["rank-8"])
    assert forwards.num > 3 + len(prompts)


def test_a_graph_for_more_tokens_serves_until_there_is_one(small: SmallWorld) -> None:
    """A prompt is answered in one step: 24 tokens are captured, 20 padded to them, 12 would be too much padding."""
    core = make_core(small, max_draft_tokens=0)
    graphs = core._machine.runner.graphs
    assert graphs is not None
    forwards = Forwards(core)

    def answer(length: int, seed: int, adapter: str | None) -> int:
        """How often the model was called for it."""
        before = forwards.num
        prompt, named = prompt_of(seed, length), small.adapters[adapter] if adapter else None
        core.submit(request("one", prompt, named, max_tokens=1))
        assert tokens(run(core)["one"]) == small.oracle.greedy(prompt, 1, named)
        return forwards.num - before

    for seed, adapter in enumerate(["rank-8", "rank-8", "rank-8", None]):  # as it is, captured, checked, checked
        assert answer(24, seed, adapter) == 1
    for seed in range(step_graphs._BORROWED_STEPS):
        assert answer(20, 10 + seed, "rank-4" if seed % 2 else None) == 0
    assert {kind.num_tokens for kind in graphs._graphs} == {24}
    assert answer(12, 30, None) == 1
    for seed in (40, 41):
        assert answer(20, seed, "rank-4") == 1  # captured, checked
    assert answer(20, 42, "rank-4") == 0
    assert {kind.num_tokens for kind in graphs._graphs} == {24, 20}


def test_graphs_that_were_not_used_for_longest_are_forgotten(
    small: SmallWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_graphs, "MOST_GRAPHS", 2)
    core = make_core(small, max_draft_tokens=0)
    for length in (5, 6, 5, 7, 5, 6, 7, 5) * 2:
        core.submit(request("one", prompt_of(length, length), max_tokens=1))
        assert tokens(run(core)["one"]) == small.oracle.greedy(prompt_of(length, length), 1, None)
    graphs = core._machine.runner.graphs
    assert graphs is not None
    assert len(graphs._graphs) == 2


@pytest.mark.parametrize(
    ("captures", "expected"),
    [
        ([], 3),
        ([(0.08, 0.02)], 4),
        ([(0.01, 0.02)], 3),
        ([(0.16, 0.0125)], 13),
        ([(0.16, 0.001)], 16),
        ([(0.1, -0.01)], 16),  # a step that was held up
        ([(0.08, 0.02), (0.08, 0.0)], 8),
    ],
)
def test_capture_waits_until_its_price_was_lost(
    monkeypatch: pytest.MonkeyPatch, captures: list[tuple[float, float]], expected: int
) -> None:
    monkeypatch.setattr(step_graphs, "FEWEST_STEPS", 3)
    monkeypatch.setattr(step_graphs, "MOST_STEPS", 16)
    worth = step_graphs._Worth()
    for taken, saved in captures:
        worth.learn(taken, saved)
    assert worth.num_steps == expected


def test_adapters_that_do_more_than_lora_go_through_the_model(small: SmallWorld) -> None:
    core = make_core(small, max_draft_tokens=0)
    forwards = Forwards(core)
    core.submit(request("dora", prompt_of(2, 9), small.adapters["rank-32-dora"], max_tokens=20, ignore_eos=True))
    assert len(tokens(run(core)["dora"])) == 20
    assert forwards.num >= 20


def test_steps_of_many_tokens_go_through_the_model(small: SmallWorld) -> None:
    core = make_core(small, max_draft_tokens=0, max_running=MOST_TOKENS + 1, max_batch_tokens=8 * MOST_TOKENS)
    for number in range(MOST_TOKENS + 1):
        core.submit(request(str(number), prompt_of(number, 4), max_tokens=6, ignore_eos=True))
    run(core)
    graphs = core._machine.runner.graphs
    assert graphs is not None
    assert max((kind.num_tokens for kind in graphs._graphs), default=0) <= MOST_TOKENS


def test_replay_that_differs_is_noticed_and_given_up(small: SmallWorld, caplog: pytest.LogCaptureFixture) -> None:
    """A model with a memory of its own in Python, which no capture can see."""
    core = make_core(small, max_draft_tokens=0)
    head: nn.Module = core._machine.runner._model.lm_head
    forward, num_calls = head.forward, 0

    def remembering(x: torch.Tensor) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        y: torch.Tensor = forward(x) + num_calls
        return y

    head.forward = remembering
    with caplog.at_level(logging.INFO, logger="loraplex.engine"):
        core.submit(request("one", prompt_of(1, 8), max_tokens=12))
        found = tokens(run(core)["one"])
    assert found == small.oracle.greedy(prompt_of(1, 8), 12, None)  # what is added to all logits changes no choice
    assert "not replayed" in caplog.text
    assert core._machine.runner.graphs is not None
    assert not core._machine.runner.graphs.is_on


def test_model_that_looks_at_numbers_is_computed_as_before(small: SmallWorld, caplog: pytest.LogCaptureFixture) -> None:
    core = make_core(small, max_draft_tokens=0)
    head: nn.Module = core._machine.runner._model.lm_head
    forward = head.forward
    head.forward = lambda x: forward(x) if x.sum() != 0 else x
    with caplog.at_level(logging.INFO, logger="loraplex.engine"):
        core.submit(request("one", prompt_of(1, 8), max_tokens=12))
        assert tokens(run(core)["one"]) == small.oracle.greedy(prompt_of(1, 8), 12, None)
    assert "_local_scalar_dense" in caplog.text


def test_eager_keeps_no_graphs(small: SmallWorld) -> None:
    assert make_core(small, enforce_eager=True)._machine.runner.graphs is None
