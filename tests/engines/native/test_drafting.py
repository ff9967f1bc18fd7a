"""Drafts: what is proposed, when it pays, and that answers do not depend on them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.bench import Bench
from support.core import make_core, prompt_of, request, run, tokens
from support.worlds import SmallWorld

from loraplex.engines.native.drafting import Drafter, StepCosts
from loraplex.engines.native.sequence import Sequence
from loraplex.engines.protocol import GenerateRequest, SamplingParams


def sequence_of(*token_ids: int) -> Sequence:
    request = GenerateRequest(
        request_id="1", prompt_token_ids=token_ids, sampling=SamplingParams(max_tokens=99, temperature=0.0)
    )
    return Sequence(request=request, seed=0, eos_token_ids=frozenset(), arrival=0.0, max_len=1000)


@pytest.mark.parametrize(
    ("token_ids", "room", "drafts"),
    [
        ((1, 2, 3, 4, 5, 1, 2, 3), 2, (4, 5)),
        ((1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3), 1, (4,)),  # the longer n-gram, though the shorter one is newer
        ((7, 1, 2, 8, 1, 2), 8, (8, 1, 2, 8, 1, 2, 8, 1)),  # a period goes on
        ((1, 2, 3, 4, 5), 8, ()),
        ((1, 2), 8, ()),
        ((1, 2, 1, 2), 0, ()),
    ],
)
def test_propose_continues_as_the_newest_n_gram_did_before(
    token_ids: tuple[int, ...], room: int, drafts: tuple[int, ...]
) -> None:
    assert Drafter(max_tokens=8).propose(sequence_of(*token_ids), room, 1) == drafts


def test_propose_finds_what_was_appended_since() -> None:
    drafter, sequence = Drafter(max_tokens=3), sequence_of(1, 2, 3)
    assert drafter.propose(sequence, 3, 1) == ()
    for token in (4, 1, 2, 3):
        sequence.append(token)
    assert drafter.propose(sequence, 3, 1) == (4, 1, 2)


@given(fixed=st.floats(0.001, 1.0), per_token=st.floats(0.0001, 0.1), sizes=st.lists(st.integers(1, 64), min_size=2))
def test_step_costs_recover_a_line(fixed: float, per_token: float, sizes: list[int]) -> None:
    costs = StepCosts()
    for size in sizes:
        costs.add(size, fixed + per_token * size)
    if len(set(sizes)) > 1:
        assert costs.seconds(8) == pytest.approx(fixed + per_token * 8, rel=0.02, abs=0.01)


def test_step_costs_follow_a_bend() -> None:
    """Tokens are nearly free up to 8 and cost as much as the step from there on: no line goes through all."""
    costs = StepCosts()
    for _ in range(5):
        for size in (1, 2, 4, 8, 16, 32):
            costs.add(size, 0.01 * max(size, 8) / 8)
    assert costs.seconds(6) == pytest.approx(0.01, rel=0.1)
    assert costs.seconds(24) == pytest.approx(0.03, rel=0.1)


def test_step_costs_forget_what_held_one_step_up() -> None:
    costs = StepCosts()
    for seconds in (0.01, 0.01, 0.01, 5.0):
        costs.add(4, seconds)
    assert costs.seconds(4) == pytest.approx(0.0125)


def test_step_costs_are_known_as_soon_as_two_sizes_were_met() -> None:
    costs = StepCosts()
    costs.add(4, 0.01)
    assert costs.seconds(6) is None
    costs.add(8, 0.02)
    assert costs.seconds(6) == pytest.approx(0.015)


def test_drafts_are_as_long_as_gives_most_tokens_a_second() -> None:
    """A step of one reads weights; eight sequences multiply already, and a draft costs what a token costs."""
    drafter = Drafter(max_tokens=8)
    for _ in range(5):
        for size in range(1, 80):
            drafter.costs.add(size, 0.01 * max(size, 8) / 8)
    sequences = [sequence_of(1, 2, 3, 1, 2, 3, 1, 2, 3) for _ in range(2)]
    drafter.learn(sequences[1], 1, 0)
    drafter.propose(sequences[1], 8, 1)
    assert len(drafter.propose(sequences[0], 8, 1)) >= 6
    assert len(drafter.propose(sequences[1], 8, 8)) == 0


def test_drafts_that_are_wrong_stop_where_tokens_cost_and_are_tried_again() -> None:
    drafter, sequence = Drafter(max_tokens=8), sequence_of(1, 2, 3, 1, 2, 3, 1, 2, 3)
    for size in (1, 9, 4, 2):
        drafter.costs.add(size, 0.01 + 0.01 * size)  # a token more costs half of what the step costs
    tried = []
    for place in range(200):
        drafts = drafter.propose(sequence, 8, 1)
        if drafts:
            tried.append(place)
            drafter.learn(sequence, len(drafts), 0)
        sequence.append((1, 2, 3)[place % 3])
    late = [place for place in tried if place > 50]
    assert 2 <= len(late) <= 6  # once in 32 tokens
    assert drafter.num_accepted == 0


def test_drafts_where_more_tokens_cost_nothing_are_made_while_some_are_right() -> None:
    drafter, sequence = Drafter(max_tokens=4), sequence_of(1, 2, 3, 1, 2, 3)
    for size in (1, 5, 3):
        drafter.costs.add(size, 0.02)
    for _ in range(50):
        assert len(drafter.propose(sequence, 4, 1)) == 4
        drafter.learn(sequence, 4, 1)


def test_drafts_leave_room_for_the_answers_end_and_the_budget() -> None:
    bench = Bench(num_drafts=8, budget=6)
    sequence = bench.add(4, max_tokens=12)
    sizes = []
    while bench.scheduler.has_work:
        sizes.append(sum(bench.step().values()))
    assert max(sizes) <= 6
    assert len(sizes) < 12
    assert sequence.num_generated == 12


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_answers_do_not_depend_on_drafts(
    small: SmallWorld, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens, drawn ones too, with penalties, log-probabilities and adapters; and drafts there were.

    However long steps take here: what they cost is not learned, so that no slow one talks the engine out of drafting.

    A bias towards four tokens makes n-grams occur again without saying what follows.
    """
    monkeypatch.setattr(Drafter, "time", lambda self, batch, seconds: None)
    prompts = [prompt_of(seed, 6) * 5 for seed in range(6)]
    bias = dict.fromkeys(range(10, 14), 6.0)
    answers = []
    for max_draft_tokens in (0, 8):
        core = make_core(small, max_draft_tokens=max_draft_tokens)
        for number, prompt in enumerate(prompts):
            adapter = [None, *small.adapters.values()][number]
            core.submit(
                request(
                    str(number), prompt, adapter, max_tokens=40, temperature=temperature, seed=number, num_logprobs=1,
                    ignore_eos=True, frequency_penalty=0.1 * (number % 2), stop_token_ids=(number,), logit_bias=bias,
                )
            )  # fmt: skip
        answers.append(run(core))
        stats = core.stats()
        assert (stats.total_draft_tokens > 20) == (max_draft_tokens > 0)
        assert 0 <= stats.total_accepted_draft_tokens <= stats.total_draft_tokens
    plain, drafted = answers
    assert {name: tokens(emissions) for name, emissions in drafted.items()} == {
        name: tokens(emissions) for name, emissions in plain.items()
    }
    for name, emissions in plain.items():
        for one, other in zip(emissions, drafted[name], strict=True):
            assert one.sampled is not None
            assert other.sampled is not None
            assert one.sampled.logprobs is not None
            assert other.sampled.logprobs is not None
            assert one.sampled.logprobs.logprob == pytest.approx(other.sampled.logprobs.logprob, abs=1e-4)


def test_drafts_of_a_repetitive_answer_save_steps(small: SmallWorld) -> None:
    """A strong bias makes the answer a run of one token, which every draft foresees."""
    steps = []
    for max_draft_tokens in (0, 8):
        core = make_core(small, max_draft_tokens=max_draft_tokens)
        core.submit(request("a", prompt_of(1, 5), max_tokens=60, ignore_eos=True, logit_bias={7: 100.0}))
        assert tokens(run(core)["a"]) == [7] * 60
        steps.append(core.stats().num_steps)
    assert steps[0] == 60
    assert steps[1] < 20
