"""What a request computes does not depend on who shares its batch: its tokens never, its bits where that is asked for.

python -m pytest tests/conformance/test_independence.py -m slow     # 1,000 random mixes, and every architecture
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from conformance.cells import make_base, make_core, prompts
from conformance.features import Feature, all_linear, attention_only, make_feature_adapter
from conformance.shrinking import tiny_config
from torch import Tensor

from loraplex.engines.native import dense
from loraplex.engines.native.batch import Batch
from loraplex.engines.native.core import EngineCore
from loraplex.engines.protocol import Adapter, EmbedRequest, GenerateRequest, SamplingParams, WeightedAdapter

ARCHITECTURES = ("llama", "gemma2")
MORE_ARCHITECTURES = (
    "mixtral",
    "qwen2",
    "gpt2",
    "deepseek_v3",
    "gpt_oss",
    "gpt_neox",
    "opt",
    "stablelm",
    "phi3",
    "olmo2",
    "granitemoe",
    "cohere2",
    "qwen3_moe",
)
ANSWER = 7
INVOCATION = [71, 72, 73]


def _tied(model: Any) -> dict[str, Any]:
    return {**attention_only(model), "modules_to_save": ["lm_head"]}


KINDS = (
    Feature("plain", 4, attention_only),
    Feature("second", 9, attention_only),
    Feature("wide", 17, all_linear),
    Feature("dora", 3, lambda model: {**attention_only(model), "use_dora": True}),
    Feature("saved", 2, _tied),
    Feature("activated", 6, lambda model: {**attention_only(model), "alora_invocation_tokens": INVOCATION}),
)
Bits = dict[tuple[str, int], Tensor]


@dataclass(frozen=True)
class World:
    """A base and the requests that are mixed: with every kind of adapter, with compositions and with none."""

    base: Path
    requests: dict[str, GenerateRequest]


def make_world(architecture: str, folder: Path) -> World:
    make_base(tiny_config(architecture), folder / "base")
    adapters = [make_feature_adapter(folder / "base", kind, folder / kind.name).adapter for kind in KINDS]
    composition = (WeightedAdapter(adapters[0], 0.5), WeightedAdapter(adapters[1], 1.0))
    ways: list[dict[str, Any]] = [{}, {"composition": composition}, *({"adapter": adapter} for adapter in adapters)]
    asked = [request(f"{place}-{number}", prompt, **way) for number, prompt in enumerate(_prompts())
             for place, way in enumerate(ways)]  # fmt: skip
    return World(folder / "base", {one.request_id: one for one in asked})


def _prompts() -> list[tuple[int, ...]]:
    first, second, third, *_ = prompts(5)
    return [first, second, (*third[:6], *INVOCATION, *first), third, second[:12] + first]


def request(name: str, prompt: tuple[int, ...], **options: Any) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling, **options)


def run(core: EngineCore, asked: list[GenerateRequest]) -> dict[str, list[int]]:
    """The tokens of each."""
    for one in asked:
        core.submit(one)
    tokens: dict[str, list[int]] = {one.request_id: [] for one in asked}
    while core.has_work or core.is_preparing:
        for emission in core.step():
            assert emission.error is None, emission.error
            assert emission.sampled is not None
            tokens[emission.sequence.request_id].append(emission.sampled.token_id)
    return tokens


def watch(core: EngineCore) -> Bits:
    """From now on, the logits of every request at every position."""
    bits: Bits = {}
    runner = core._machine.runner
    compute = runner.logits

    def logits(batch: Batch) -> Tensor:
        found = compute(batch)
        places = [(s.sequence.request_id, s.start + row) for s in batch.segments for row in s.rows]
        for place, row in zip(places, found, strict=True):
            bits[place] = row.clone()
        return found

    runner.logits = logits  # type: ignore[method-assign]
    return bits


def alone(core: EngineCore, world: World) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for one in world.requests.values():
        found |= run(core, [msgspec.structs.replace(one, cache_salt=one.request_id)])  # with nothing in the cache
    return found


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def mixes_of(world: World, number: int, size: int, seed: int) -> Iterator[list[GenerateRequest]]:
    draw = random.Random(seed)
    for _ in range(number):
        yield draw.sample(list(world.requests.values()), size)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("llama", tmp_path_factory.mktemp("mixed"))


@pytest.mark.parametrize("num_mixes", [4, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_greedy_tokens_are_the_same_alone_and_among_31_others(num_mixes: int, llama: World) -> None:
    expected = alone(make_core(llama.base, num_blocks=None), llama)
    core = make_core(llama.base, num_blocks=60, max_batch_tokens=48)
    for mix in mixes_of(llama, num_mixes, 32, seed=1):
        for name, tokens in run(core, mix).items():
            assert tokens == expected[name], name
    stats = core.stats()
    assert stats.total_preemptions > 0
    assert stats.total_cached_prompt_tokens > 0


@pytest.mark.parametrize(
    "architecture",
    [
        *ARCHITECTURES,
        *(pytest.param(name, marks=[pytest.mark.slow, pytest.mark.timeout(900)]) for name in MORE_ARCHITECTURES),
    ],
)
def test_deterministic_logits_are_the_same_bits_in_every_company(architecture: str, tmp_path: Path) -> None:
    world = make_world(architecture, tmp_path)
    one_by_one = make_core(world.base, num_blocks=None, deterministic=True, max_batch_tokens=48)
    expected = watch(one_by_one)
    alone(one_by_one, world)
    assert len(expected) == len(world.requests) * ANSWER
    core = make_core(world.base, num_blocks=26, deterministic=True)  # chunks of 13 tokens at most
    found = watch(core)
    for mix in mixes_of(world, 2, 16, seed=2):
        run(core, mix)
        for place, bits in found.items():
            assert torch.equal(bits, expected[place]), place
        found.clear()
    stats = core.stats()
    assert stats.total_preemptions > 0
    assert stats.total_cached_prompt_tokens > 0


def test_deterministic_bits_do_not_depend_on_what_a_start_measures(
    llama: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_numbers_of_tokens", lambda weights: range(0))  # as where torch were always faster
    core = make_core(llama.base, num_blocks=None, deterministic=True)
    expected = watch(core)
    alone(core, llama)
    monkeypatch.setattr(dense, "_numbers_of_tokens", lambda weights: range(1, sys.maxsize))
    other = make_core(llama.base, num_blocks=None, deterministic=True)
    found = watch(other)
    alone(other, llama)
    assert len(found) == len(expected) == len(llama.requests) * ANSWER
    assert all(torch.equal(bits, expected[place]) for place, bits in found.items())


def test_without_being_asked_bits_depend_on_company(llama: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests of it would show nothing. They do where torch multiplies."""
    monkeypatch.setattr(dense, "_numbers_of_tokens", lambda weights: range(0))
    core = make_core(llama.base, num_blocks=None, max_batch_tokens=48)
    expected = watch(core)
    alone(core, llama)
    other = make_core(llama.base, num_blocks=26)
    found = watch(other)
    run(other, next(mixes_of(llama, 1, 16, seed=2)))
    assert any(not torch.equal(bits, expected[place]) for place, bits in found.items())


def test_deterministic_embeddings_are_the_same_in_every_company(llama: World) -> None:
    vectors: dict[int, set[tuple[float, ...]]] = {0: set(), 1: set()}
    adapters: list[Adapter | None] = [None, next(one.adapter for one in llama.requests.values() if one.adapter)]
    for budget in (48, 13, 5):
        core = make_core(llama.base, num_blocks=None, deterministic=True, max_batch_tokens=budget)
        for company in ([], list(llama.requests.values())[:9]):
            for one in company:
                core.submit(one)
            for number, adapter in enumerate(adapters):
                core.embed(EmbedRequest(request_id=f"e{number}", prompt_token_ids=_prompts()[2], adapter=adapter))
            while core.has_work or core.is_preparing:
                for emission in core.step():
                    if emission.embedding is not None:
                        vectors[int(emission.sequence.request_id[1:])].add(emission.embedding)
    assert [len(found) for found in vectors.values()] == [1, 1]
    assert vectors[0] != vectors[1]
