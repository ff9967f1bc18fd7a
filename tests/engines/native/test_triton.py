"""The engine on the Triton kernels, interpreted where there is no GPU, against transformers + PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cells import Asked, expected_logprobs, make_base, relative_error, serve
from conformance.cells import make_core as make_tiny_core
from conformance.shrinking import tiny_config
from support.core import make_core, prompt_of, request, run, tokens
from support.worlds import SmallWorld, make_small_world
from transformers import AutoModelForCausalLM

from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.device_lora import DeviceLora, _Table
from loraplex.engines.native.device_sampler import pick_by_thresholds
from loraplex.engines.protocol import GenerateRequest, SamplingParams, WeightedAdapter

# float32 on both sides, in another order of summation.
TOLERANCE = 1e-4


pytestmark = pytest.mark.timeout(400)  # the interpreter takes milliseconds for what a GPU does in none


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    """One layer: the others would do the same again, at the interpreter's pace."""
    return make_small_world(tmp_path_factory.mktemp("shallow"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def core(shallow: SmallWorld) -> EngineCore:
    return make_core(shallow, kernels="triton", max_batch_tokens=24)


def test_mixed_batch_on_the_kernels_gives_the_tokens_of_peft_alone(shallow: SmallWorld, core: EngineCore) -> None:
    """Every kind of adapter in the same steps, prompts in chunks, prefill beside decode."""
    assert isinstance(core._machine.runner._lora, DeviceLora)
    adapters = [None, *shallow.adapters.values()]
    prompts = [prompt_of(seed, 2 + 3 * seed) for seed in range(len(adapters))]
    for number, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        core.submit(request(str(number), prompt, adapter, max_tokens=2))
    emissions = run(core, seconds=300.0)
    for number, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        assert tokens(emissions[str(number)]) == shallow.oracle.greedy(prompt, 2, adapter), adapter


def test_composition_on_the_kernels_equals_the_torch_forms(shallow: SmallWorld, core: EngineCore) -> None:
    """The torch forms are held against PEFT's weighted sum in tests/conformance."""
    parts = tuple(
        WeightedAdapter(shallow.adapters[name], weight) for name, weight in (("rank-8", 0.75), ("rank-4", -0.5))
    )
    sampling = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    prompt = tuple(prompt_of(3, 12))
    found = []
    for one in (core, make_core(shallow)):
        one.submit(GenerateRequest(request_id="some", prompt_token_ids=prompt, composition=parts, sampling=sampling))
        one.submit(request("base", prompt_of(4, 3), max_tokens=3))
        emissions = run(one, seconds=300.0)
        found.append((tokens(emissions["some"]), tokens(emissions["base"])))
    assert found[0] == found[1]
    assert found[0][0] != shallow.oracle.greedy(list(prompt), 3, None)


def test_seed_draws_the_same_on_the_kernels_in_any_company(core: EngineCore) -> None:
    assert core._machine.runner._pick is pick_by_thresholds
    found = []
    for others in ((), (0.0, 0.9)):
        controls: dict[str, Any] = {"max_tokens": 3, "seed": 5, "top_p": 0.9, "top_k": 40, "ignore_eos": True}
        core.submit(request("one", prompt_of(1, 4), temperature=1.5, **controls))
        for number, temperature in enumerate(others):
            core.submit(request(str(number), prompt_of(2 + number, 4), max_tokens=3, temperature=temperature))
        found.append(tokens(run(core, seconds=300.0)["one"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("architecture", [pytest.param("gemma2", marks=pytest.mark.slow), "gpt_oss"])
def test_windows_caps_and_sinks_reach_the_kernels(architecture: str, tmp_path: Path) -> None:
    config = tiny_config(architecture)
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]  # one with a window, one without
    model: Any = make_base(config, tmp_path)
    core = make_tiny_core(tmp_path, num_blocks=None, kernels="triton")
    assert {window is None for window in core._machine.runner._attention.windows} == {True, False}
    asked = [Asked("short", (5, 6, 7), None), Asked("long", tuple(range(3, 20)), None)]
    answers = serve(core, asked, seconds=300.0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for one in asked:
        expected = expected_logprobs(model, one, answers[one.name].tokens)
        assert relative_error(answers[one.name], expected) < TOLERANCE


def test_rows_of_the_table_are_written_anew_when_an_adapter_has_moved(small: SmallWorld) -> None:
    core = make_core(small)
    for adapter in small.adapters.values():
        core.submit(request(adapter.name, prompt_of(1, 3), adapter, max_tokens=1))
    run(core)
    arena = core._machine.arena
    table = _Table(arena, len(core._machine.base.modules))
    ids = [adapter.id for adapter in small.adapters.values()]
    slots = table.slots(ids)
    assert sorted(slots) == sorted(ids)
    assert len(set(slots.values())) == len(ids)
    before = table.table.a[slots[ids[0]]].clone()
    assert table.slots(ids) == slots
    arena._offsets[ids[0]] += 64
    assert table.slots(ids) == slots
    moved = table.table.a[slots[ids[0]]]
    touched = table.table.rank[slots[ids[0]]] > 0
    assert torch.equal(moved[touched], before[touched] + 64)
