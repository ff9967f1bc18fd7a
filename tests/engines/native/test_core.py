"""The core against transformers + PEFT: mixed batches, chunked prefill, preemption, aborts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from support.core import make_core, prompt_of, request, run, tokens
from support.worlds import SmallWorld

from loraplex.engines.errors import (
    AdapterUnsupported,
    DeadlineExceeded,
    EngineOverloaded,
    InvalidRequest,
    PromptTooLong,
)
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.loading import load_machine
from loraplex.engines.native.lora import LoraLayers
from loraplex.engines.native.scheduler import Emission
from loraplex.engines.protocol import AdapterUse, WeightedAdapter


def test_mixed_batch_gives_the_tokens_of_peft_alone(small: SmallWorld) -> None:
    core = make_core(small)
    adapters = [None, *small.adapters.values()]
    prompts = [prompt_of(seed, 5 + 9 * seed) for seed in range(len(adapters))]
    for number, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        core.submit(request(str(number), prompt, adapter, max_tokens=24))
    emissions = run(core)
    for number, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        assert tokens(emissions[str(number)]) == small.oracle.greedy(prompt, 24, adapter), adapter
    assert core.blocks.num_used == 0


def test_adapters_change_the_answer(small: SmallWorld) -> None:
    """Otherwise the test above would prove nothing."""
    answers = {tuple(small.oracle.greedy(prompt_of(3, 20), 12, a)) for a in [None, *small.adapters.values()]}
    assert len(answers) == len(small.adapters) + 1


def test_preempted_sequences_lose_and_repeat_nothing(small: SmallWorld) -> None:
    core = make_core(small, kv_cache_bytes=40 * 4 * 3 * 2 * 32 * 4, max_batch_tokens=20)
    adapters = list(small.adapters.values())
    prompts = [prompt_of(seed, 30) for seed in range(6)]
    for number, prompt in enumerate(prompts):
        core.submit(request(str(number), prompt, adapters[number % len(adapters)], max_tokens=30, ignore_eos=True))
    emissions = run(core)
    assert core.stats().total_preemptions > 0
    for number, prompt in enumerate(prompts):
        expected = small.oracle.greedy(prompt, 30, adapters[number % len(adapters)])
        assert tokens(emissions[str(number)])[: len(expected)] == expected
        assert len(tokens(emissions[str(number)])) == 30
    assert core.blocks.num_used == 0


def test_end_frees_blocks_and_place_before_the_next_step(small: SmallWorld) -> None:
    core = make_core(small)
    core.submit(request("stays", prompt_of(1, 8), max_tokens=200, ignore_eos=True))
    core.submit(request("leaves", prompt_of(2, 40), small.adapters["rank-8"], max_tokens=200, ignore_eos=True))
    while core.stats().num_running < 2:
        core.step()
    used, steps = core.blocks.num_used, core.stats().num_steps
    core.end("leaves", aborted=True)
    stats = core.stats()
    assert stats.num_steps == steps
    assert stats.num_running == 1
    assert stats.total_aborted == 1
    assert stats.num_kv_blocks_used == used - 10  # 40 prompt tokens in blocks of four
    assert {emission.sequence.request_id for emission in core.step()} == {"stays"}


def test_same_seed_draws_the_same_tokens_in_any_company(small: SmallWorld) -> None:
    core = make_core(small)
    drawn: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 16, "top_p": 0.95, "ignore_eos": True}
    core.submit(request("alone", prompt_of(1, 8), **drawn))
    alone = tokens(run(core)["alone"])
    for number in range(5):
        core.submit(request(f"other{number}", prompt_of(number, 17), temperature=1.0))
    core.submit(request("among", prompt_of(1, 8), **drawn))
    core.submit(request("reseeded", prompt_of(1, 8), **{**drawn, "seed": 8}))
    emissions = run(core)
    assert tokens(emissions["among"]) == alone
    assert tokens(emissions["reseeded"]) != alone


def test_adapter_that_left_stays_stacked_and_changes_no_token(small: SmallWorld) -> None:
    core = make_core(small)
    wide, narrow = small.adapters["rank-64-mlp"], small.adapters["rank-32-dora"]
    for adapter in (wide, narrow):
        core.adapters.load(adapter, lambda error: None)
    while core.stats().num_adapters_on_device < 2:
        core.step()
    core.submit(request("long", prompt_of(7, 9), wide, max_tokens=30, ignore_eos=True))
    core.submit(request("short", prompt_of(8, 9), narrow, max_tokens=3, ignore_eos=True))
    emissions = run(core)
    lora = core._machine.runner._lora
    assert isinstance(lora, LoraLayers)
    assert len(lora._recent) <= 2
    assert lora._recent[0].positions.keys() == {wide.id, narrow.id}
    expected = small.oracle.greedy(prompt_of(7, 9), 30, wide)
    assert tokens(emissions["long"])[: len(expected)] == expected


def test_logprobs_equal_those_of_peft(small: SmallWorld) -> None:
    core = make_core(small)
    adapter, prompt = small.adapters["rank-8"], prompt_of(4, 21)
    core.submit(request("a", prompt, adapter, num_logprobs=2, ignore_eos=True))
    core.submit(request("b", prompt_of(5, 9)))
    emissions = run(core)["a"]
    answer = tokens(emissions)
    expected = small.oracle.logits(prompt + answer, adapter).log_softmax(dim=-1)[len(prompt) - 1 : -1]
    for emission, wanted in zip(emissions, expected, strict=True):
        assert emission.sampled is not None
        assert emission.sampled.logprobs is not None
        assert emission.sampled.logprobs.logprob == pytest.approx(float(wanted[emission.sampled.token_id]), abs=1e-4)
        assert [token for token, _ in emission.sampled.logprobs.top] == wanted.topk(2).indices.tolist()


def test_prefix_hits_change_no_token(small: SmallWorld) -> None:
    core = make_core(small)
    adapter, prompt = small.adapters["rank-32-dora"], prompt_of(6, 50)
    answers = []
    for number in range(2):
        core.submit(request(str(number), prompt, adapter, max_tokens=20))
        answers.append(tokens(run(core)[str(number)]))
    assert answers[0] == answers[1] == small.oracle.greedy(prompt, 20, adapter)
    assert core.stats().total_cached_prompt_tokens == 48


def test_leavings_in_the_cache_never_reach_a_token(small: SmallWorld) -> None:
    """A block is handed on with what its last holder wrote; were it ever read, NaN would show."""
    machine = load_machine(small.settings(), lambda progress: None)
    attention = machine.runner._attention
    for cache in [*attention._keys, *attention._values]:
        cache[:-2] = float("nan")  # the row of zeros that padding reads is the last but one
        cache[-1] = float("nan")
    core = EngineCore(machine)
    prompts = [prompt_of(seed, length) for seed, length in enumerate([3, 50, 17, 9])]
    for number, prompt in enumerate(prompts):
        core.submit(request(str(number), prompt, max_tokens=20))
    emissions = run(core)
    for number, prompt in enumerate(prompts):
        assert tokens(emissions[str(number)]) == small.oracle.greedy(prompt, 20, None)


@pytest.mark.parametrize(
    ("field", "changes"),
    [("stop_token_ids", {"stop_token_ids": (320,)}), ("logit_bias", {"logit_bias": {-1: 1.0}}), ("prompt", {})],
)
def test_submit_token_id_outside_the_vocabulary_raises_naming_the_field(
    small: SmallWorld, field: str, changes: dict[str, Any]
) -> None:
    core = make_core(small)
    with pytest.raises(InvalidRequest) as caught:
        core.submit(request("bad", [5, 320] if field == "prompt" else [5], **changes))
    assert caught.value.param == field
    assert not core.has_work


def test_submit_prompt_too_long_raises_and_keeps_nothing(small: SmallWorld) -> None:
    core = make_core(small)
    with pytest.raises(PromptTooLong, match="512 tokens; at most 511"):
        core.submit(request("long", prompt_of(1, 512)))
    assert not core.has_work


def errors(emissions: dict[str, list[Emission]]) -> dict[str, type[Exception]]:
    return {name: type(found[-1].error) for name, found in emissions.items() if found[-1].error is not None}


def test_full_queue_the_tenant_that_fills_it_loses_its_last(small: SmallWorld) -> None:
    core = make_core(small, max_waiting=3)
    for number, tenant in enumerate(["noisy", "noisy", "noisy", "quiet", "noisy", "quiet"]):
        core.submit(msgspec.structs.replace(request(str(number), prompt_of(1, 8)), tenant=tenant))
    emissions = run(core)
    assert errors(emissions) == {"2": EngineOverloaded, "4": EngineOverloaded, "5": EngineOverloaded}
    assert core.stats().total_failed == 3
    assert all(len(emissions[name]) == 12 for name in "013")


def test_preempted_request_is_not_what_a_full_queue_loses(small: SmallWorld) -> None:
    core = make_core(small, max_waiting=1, kv_cache_bytes=10 * 4 * 3 * 2 * 32 * 4)
    core.submit(request("old", prompt_of(1, 7), max_tokens=20, ignore_eos=True))
    core.step()
    core.submit(request("young", prompt_of(2, 7), max_tokens=20, ignore_eos=True))
    for _ in range(20):
        core.step()
        if core.scheduler.num_preemptions:
            break
    core.submit(request("late", prompt_of(3, 7), max_tokens=20, ignore_eos=True))
    emissions = run(core)
    assert errors(emissions) == {"late": EngineOverloaded}
    assert {name: found[-1].finish_reason for name, found in emissions.items() if name != "late"} == {
        "old": "length",
        "young": "length",
    }


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_request_past_its_deadline_ends_though_it_runs_and_its_neighbour_goes_on(small: SmallWorld) -> None:
    clock = Clock()
    core = EngineCore(load_machine(small.settings(), lambda progress: None), clock)
    core.submit(msgspec.structs.replace(request("hurried", prompt_of(1, 8), max_tokens=50), timeout_seconds=2.0))
    core.submit(request("patient", prompt_of(2, 8), max_tokens=50, ignore_eos=True))
    core.step()
    clock.now += 2.0
    emissions = run(core)
    assert errors(emissions) == {"hurried": DeadlineExceeded}
    assert "within 2 s" in str(emissions["hurried"][-1].error)
    assert emissions["patient"][-1].finish_reason == "length"
    assert core.blocks.num_used == 0


def test_request_that_waits_too_long_for_its_first_step_is_refused(small: SmallWorld) -> None:
    clock = Clock()
    core = EngineCore(load_machine(small.settings(max_running=1, max_wait_seconds=5.0), lambda progress: None), clock)
    core.submit(request("first", prompt_of(1, 8), max_tokens=30, ignore_eos=True))
    core.submit(request("second", prompt_of(2, 8)))
    core.step()
    clock.now += 5.0
    emissions = run(core)
    assert errors(emissions) == {"second": EngineOverloaded}
    assert len(emissions["first"]) == 29


@pytest.mark.parametrize(("shares", "salt", "num_cached"), [(False, "", 0), (True, "", 20), (True, "own", 0)])
def test_prefixes_are_shared_across_tenants_that_say_so_and_no_salt_apart(
    small: SmallWorld, shares: bool, salt: str, num_cached: int
) -> None:
    core = make_core(small)
    for tenant, its_salt in (("one", ""), ("two", salt)):
        wanted = request(tenant, prompt_of(1, 21), max_tokens=2)
        core.submit(msgspec.structs.replace(wanted, tenant=tenant, shares_prefixes=shares, cache_salt=its_salt))
        run(core)
    assert core.stats().total_cached_prompt_tokens == num_cached


def test_stats_say_where_the_time_went(small: SmallWorld) -> None:
    core = make_core(small)
    for number in range(3):
        core.submit(request(str(number), prompt_of(number, 8)))
    run(core)
    stats = core.stats()
    assert sum(stats.step_durations.counts) == stats.num_steps > 0
    assert sum(stats.wait_durations.counts) == 3
    assert set(stats.phase_seconds) == {"adapters", "schedule", "forward", "sample", "commit"}
    in_steps = sum(stats.phase_seconds.values()) - stats.phase_seconds["adapters"]
    assert 0 < in_steps <= stats.step_durations.seconds


@pytest.mark.parametrize("budget", [7, 48])
def test_prompt_logprobs_equal_those_of_peft(small: SmallWorld, budget: int) -> None:
    """In chunks and in one go, with the prompt in the cache or not, and after preemption."""
    core = make_core(small, max_batch_tokens=budget)
    adapter, prompt = small.adapters["rank-8"], prompt_of(4, 21)
    expected = small.oracle.logits(prompt, adapter).log_softmax(dim=-1)
    for name in ("fresh", "cached"):
        core.submit(request(name, prompt, adapter, num_prompt_logprobs=3, max_tokens=3, ignore_eos=True))
        core.submit(request(f"{name}-plain", prompt, adapter, max_tokens=3, ignore_eos=True))
        emissions = run(core)
        first, *rest = emissions[name]
        assert [emission.prompt_logprobs for emission in rest] == [(), ()]
        assert len(first.prompt_logprobs) == 20
        for told, wanted, token in zip(first.prompt_logprobs, expected, prompt[1:], strict=False):
            assert told.logprob == pytest.approx(float(wanted[token]), abs=1e-4)
            assert [token for token, _ in told.top] == wanted.topk(3).indices.tolist()
        assert tokens(emissions[name]) == tokens(emissions[f"{name}-plain"])
        assert emissions[f"{name}-plain"][0].prompt_logprobs == ()


def test_prompt_logprobs_of_a_preempted_prompt_are_told_once(small: SmallWorld) -> None:
    core = make_core(small, max_batch_tokens=8, kv_cache_bytes=14 * 4 * 3 * 2 * 32 * 4)
    prompts = {str(number): prompt_of(number, 30) for number in range(3)}
    for name, prompt in prompts.items():
        core.submit(request(name, prompt, num_prompt_logprobs=0, max_tokens=20, ignore_eos=True))
    emissions = run(core)
    assert core.stats().total_preemptions > 0
    for name, prompt in prompts.items():
        expected = small.oracle.logits(prompt, None).log_softmax(dim=-1)
        told = [one for emission in emissions[name] for one in emission.prompt_logprobs]
        wanted = [float(row[token]) for row, token in zip(expected, prompt[1:], strict=False)]
        assert [one.logprob for one in told] == pytest.approx(wanted, abs=1e-4)


def test_choices_of_one_prompt_compute_it_once(small: SmallWorld) -> None:
    core = make_core(small, max_batch_tokens=16)
    prompt = prompt_of(9, 41)
    for number in range(4):
        core.submit(request(str(number), prompt, temperature=1.0, seed=number, max_tokens=8, ignore_eos=True))
    shared = run(core)
    assert core.stats().total_cached_prompt_tokens == 3 * 40
    for number in range(4):
        core = make_core(small)
        core.submit(request("alone", prompt, temperature=1.0, seed=number, max_tokens=8, ignore_eos=True))
        assert tokens(run(core)["alone"]) == tokens(shared[str(number)])


def test_bad_words_are_those_that_transformers_excludes(small: SmallWorld) -> None:
    core = make_core(small)
    prompt = prompt_of(3, 12)
    plain = small.oracle.greedy(prompt, 12, None)
    words = [[plain[0]], plain[1:3], [prompt[-1], plain[1]]]
    core.submit(request("a", prompt, bad_words_ids=tuple(tuple(word) for word in words)))
    core.submit(request("b", prompt))
    emissions = run(core)
    assert tokens(emissions["a"]) == small.oracle.greedy(prompt, 12, None, bad_words_ids=words)
    assert tokens(emissions["a"]) != plain
    assert tokens(emissions["b"]) == plain
    with pytest.raises(InvalidRequest, match="bad_words_ids has a word without tokens"):
        core.submit(request("c", prompt, bad_words_ids=((),)))
    with pytest.raises(InvalidRequest, match="bad_words_ids has a token id outside"):
        core.submit(request("d", prompt, bad_words_ids=((10**6,),)))


def test_allowed_tokens_are_all_that_transformers_takes(small: SmallWorld) -> None:
    core = make_core(small)
    prompt = prompt_of(3, 12)
    plain = small.oracle.greedy(prompt, 12, None)
    allowed = [plain[1], *range(5, 300, 7)]
    core.submit(request("a", prompt, allowed_token_ids=tuple(allowed)))
    core.submit(request("drawn", prompt, allowed_token_ids=(9, 10), temperature=1.0, seed=1))
    core.submit(request("b", prompt))
    emissions = run(core)
    expected = small.oracle.greedy(prompt, 12, None, prefix_allowed_tokens_fn=lambda _, ids: allowed)
    assert tokens(emissions["a"]) == expected != plain
    assert set(tokens(emissions["drawn"])) == {9, 10}
    assert tokens(emissions["b"]) == plain
    with pytest.raises(InvalidRequest, match="allowed_token_ids has a token id outside"):
        core.submit(request("c", prompt, allowed_token_ids=(320,)))


def test_bias_and_shortest_answer_are_those_of_transformers(small: SmallWorld) -> None:
    """Towards the end token, which the answers would not come to so soon, and towards another."""
    core = make_core(small)
    end, prompt = 257, prompt_of(3, 12)
    controls: dict[str, Any] = {"logit_bias": {end: 60.0, 40: 8.0}}
    bias: list[list[object]] = [[[end], 60.0], [[40], 8.0]]
    core.submit(request("ends at once", prompt, **controls))
    core.submit(request("ends when it may", prompt, min_tokens=5, **controls))
    core.submit(request("plain", prompt))
    emissions = run(core)
    assert tokens(emissions["ends at once"]) == [end] == small.oracle.greedy(prompt, 12, None, sequence_bias=bias)
    expected = small.oracle.greedy(prompt, 12, None, sequence_bias=bias, min_new_tokens=5)
    assert tokens(emissions["ends when it may"]) == expected
    assert (len(expected), expected[-1]) == (6, end)
    assert tokens(emissions["plain"])[:5] != expected[:5]


def test_request_that_excludes_every_token_fails_alone(small: SmallWorld) -> None:
    core = make_core(small)
    core.submit(request("a", prompt_of(1, 4), bad_words_ids=tuple((token,) for token in range(320))))
    core.submit(request("b", prompt_of(2, 4)))
    emissions = run(core)
    assert "nothing can follow" in str(emissions["a"][-1].error)
    assert tokens(emissions["b"]) == small.oracle.greedy(prompt_of(2, 4), 12, None)


def test_one_content_under_two_names_is_told_apart_by_tenant_and_name(small: SmallWorld) -> None:
    """A refusal, too, names it as whoever asked does."""
    core, content = make_core(small), small.adapters["rank-32-dora"]
    theirs, mine = (msgspec.structs.replace(content, name=name) for name in ("theirs", "mine"))
    for number in range(2):
        asked = request(str(number), prompt_of(1, 8), theirs, max_tokens=100, ignore_eos=True)
        core.submit(msgspec.structs.replace(asked, tenant="t2"))
    while not core.scheduler.running:
        core.step()
    parts = (WeightedAdapter(mine, 1.0), WeightedAdapter(small.adapters["rank-4"], 1.0))
    core.submit(msgspec.structs.replace(request("sum", prompt_of(2, 8)), tenant="t1", composition=parts))
    uses = {found.adapter_id: found.uses for found in core.residency()}
    assert uses == {
        content.id: (AdapterUse("t2", "theirs", 2), AdapterUse("t1", "mine", 1)),
        parts[1].adapter.id: (AdapterUse("t1", "rank-4", 1),),
    }
    error = run(core)["sum"][-1].error
    assert isinstance(error, AdapterUnsupported)
    assert str(error).startswith("mine is a DoRA")
    assert all(not found.uses for found in core.residency())
