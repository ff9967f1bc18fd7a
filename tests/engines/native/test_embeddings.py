"""Pooled hidden states, held against transformers + PEFT, beside generations and under every way of being cut up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.core import make_core, prompt_of, request, run, tokens
from support.worlds import SmallWorld

from loraplex.engines.errors import AdapterInvalid, InvalidRequest, PromptTooLong
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.pooling import Pool
from loraplex.engines.native.scheduler import Emission
from loraplex.engines.protocol import Adapter, EmbedRequest, WeightedAdapter

TOLERANCE = 1e-4  # relative: float32 in another order of summation
POOLINGS = ("mean", "last", "cls")


def wanted(name: str, prompt: list[int], adapter: Adapter | None = None, **options: Any) -> EmbedRequest:
    return EmbedRequest(request_id=name, prompt_token_ids=tuple(prompt), adapter=adapter, **options)


@torch.inference_mode()
def expected(small: SmallWorld, one: EmbedRequest) -> torch.Tensor:
    """By the model's own report of its last hidden states. Shape [H], float64."""
    model = small.oracle.model(one.adapter)
    ids = torch.tensor([one.prompt_token_ids])
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].double()
    pooled = {"mean": hidden.mean(0), "last": hidden[-1], "cls": hidden[0]}[one.pooling]
    result: torch.Tensor = pooled / pooled.norm() if one.normalize else pooled
    return result


def embedding(emissions: list[Emission]) -> torch.Tensor:
    [emission] = emissions
    assert emission.error is None, emission.error
    assert emission.embedding is not None
    return torch.tensor(emission.embedding, dtype=torch.float64)


def hold(found: torch.Tensor, reference: torch.Tensor) -> None:
    assert float((found - reference).abs().max() / reference.abs().max()) <= TOLERANCE


def embed(core: EngineCore, one: EmbedRequest) -> torch.Tensor:
    core.embed(one)
    return embedding(run(core)[one.request_id])


def test_text_in_the_background_comes_after_one_that_is_not(small: SmallWorld) -> None:
    core = make_core(small, max_running=1)
    core.embed(wanted("background", prompt_of(1, 5), is_background=True, tenant="a"))
    core.embed(wanted("foreground", prompt_of(2, 5), tenant="b"))
    assert list(run(core)) == ["foreground", "background"]


@pytest.mark.parametrize("engine", [
    {}, {"max_batch_tokens": 7}, {"max_batch_tokens": 7, "kv_block_size": 4, "kv_cache_bytes": 40_000},
], ids=["whole", "in-chunks", "preempted"])  # fmt: skip
def test_embeddings_of_many_adapters_beside_generations_are_the_references(
    small: SmallWorld, engine: dict[str, Any]
) -> None:
    core = make_core(small, **engine)
    adapters: list[Adapter | None] = [None, *small.adapters.values()]
    asked = [
        wanted(f"{pooling}-{number}-{adapter.name if adapter else None}", prompt_of(number, length), adapter,
               pooling=pooling, normalize=number != 1)
        for number, length in enumerate((1, 7, 30)) for pooling in POOLINGS for adapter in adapters
    ]  # fmt: skip
    generations = [request(f"g{n}", prompt_of(50 + n, 9 + n), adapter) for n, adapter in enumerate(adapters)]
    for number, one in enumerate(asked):
        core.embed(one)
        if number < len(generations):
            core.submit(generations[number])
    found = run(core)
    for one in asked:
        hold(embedding(found[one.request_id]), expected(small, one))
    for generation in generations:
        greedy = small.oracle.greedy(list(generation.prompt_token_ids), 12, generation.adapter)
        assert tokens(found[generation.request_id]) == greedy
    assert (core.stats().total_preemptions > 0) == ("kv_cache_bytes" in engine)
    assert core.blocks.num_used == 0
    assert not core.has_work


def test_chunk_borders_change_no_bit_of_what_is_summed() -> None:
    """The rows may differ in their last bits between steps of other sizes, so one step's are cut up here."""
    rows = torch.randn(40, 64).numpy()
    vectors = set()
    for cut in (1, 7, 40):
        pool = Pool("mean", True, 40)
        for first in range(0, 40, cut):
            assert pool.missing(first, first + cut) == range(first, min(first + cut, 40))
            pool.add(rows[first : first + cut])
        vectors.add(pool.values)
    assert len(vectors) == 1


def test_last_pooling_finds_the_prefix_and_mean_computes_what_it_needs(small: SmallWorld) -> None:
    core = make_core(small, kv_block_size=4)
    prompt = prompt_of(3, 30)
    for number, (pooling, num_cached) in enumerate([("mean", 0), ("last", 28), ("mean", 0), ("cls", 0)]):
        one = wanted(f"{number}", prompt, small.adapters["rank-4"], pooling=pooling)
        core.embed(one)
        [emission] = run(core)[one.request_id]
        assert emission.sequence.num_cached_tokens == num_cached
        hold(embedding([emission]), expected(small, one))


def test_composition_is_embedded_with_all_of_its_adapters(small: SmallWorld) -> None:
    core = make_core(small)
    prompt, [one, two] = prompt_of(5, 12), [small.adapters["rank-4"], small.adapters["rank-8"]]

    def composed(name: str, *parts: tuple[Adapter, float]) -> torch.Tensor:
        composition = tuple(WeightedAdapter(adapter, weight) for adapter, weight in parts)
        return embed(core, wanted(name, prompt, composition=composition, normalize=False))

    hold(composed("single", (one, 1.0)), expected(small, wanted("", prompt, one, normalize=False)))
    hold(composed("none", (one, 0.0), (two, 0.0)), expected(small, wanted("", prompt, normalize=False)))
    assert not torch.allclose(composed("both", (one, 1.0), (two, 1.0)), composed("one", (one, 1.0), (two, 0.0)))


def test_whole_context_may_be_embedded_and_no_more(small: SmallWorld) -> None:
    core = make_core(small)
    limit = core._machine.info.max_model_len
    one = wanted("full", prompt_of(7, limit), pooling="last")
    hold(embed(core, one), expected(small, one))
    with pytest.raises(PromptTooLong, match=f"the prompt has {limit + 1} tokens; at most {limit} fit"):
        core.embed(wanted("long", prompt_of(7, limit + 1)))


def test_bad_requests_name_the_reason_and_leave_nothing(small: SmallWorld) -> None:
    core, adapter = make_core(small), small.adapters["rank-4"]
    with pytest.raises(InvalidRequest, match="no tokens"):
        core.embed(wanted("empty", []))
    with pytest.raises(InvalidRequest, match="outside 0"):
        core.embed(wanted("outside", [5, 10**6]))
    with pytest.raises(InvalidRequest, match="either an adapter or a composition"):
        core.embed(wanted("both", [5], adapter, composition=(WeightedAdapter(adapter, 1.0),)))
    core.embed(wanted("broken", [5], Adapter(id="sha-none", name="none", path="/nonexistent")))
    [emission] = run(core)["broken"]
    assert isinstance(emission.error, AdapterInvalid)
    assert not core.has_work
    assert core.blocks.num_used == 0
