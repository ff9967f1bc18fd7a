"""Several adapters in one request, and adapters that begin to act in the middle of one, against PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cells import Answer, Asked, expected_logprobs, make_base, make_core, prompts, relative_error
from conformance.features import Feature, Trained, all_linear, attention_only, make_feature_adapter
from conformance.shrinking import tiny_config
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraplex.engines.errors import AdapterTooLarge, AdapterUnsupported, InvalidRequest
from loraplex.engines.native.core import EngineCore
from loraplex.engines.protocol import Adapter, GenerateRequest, SamplingParams, WeightedAdapter

TOLERANCE = 1e-4
INVOCATION = [71, 72, 73]
KINDS = (
    Feature("one", 4, attention_only),
    Feature("two", 9, all_linear),
    Feature("dora", 3, lambda model: {**attention_only(model), "use_dora": True}),
    Feature("norms", 2, lambda model: {**attention_only(model), "modules_to_save": ["input_layernorm"]}),
    Feature("activated", 6, lambda model: {**attention_only(model), "alora_invocation_tokens": INVOCATION}),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("composed") / "base"
    make_base(tiny_config("qwen2"), directory)  # its q, k and v have biases, which DoRA treats apart
    return directory


@pytest.fixture(scope="module")
def trained(base: Path) -> dict[str, Trained]:
    return {kind.name: make_feature_adapter(base, kind, base.parent / kind.name) for kind in KINDS}


@pytest.fixture
def core(base: Path) -> EngineCore:
    return make_core(base, num_blocks=None)


def composed(name: str, prompt: tuple[int, ...], *parts: tuple[Adapter, float]) -> GenerateRequest:
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, num_logprobs=128),
        composition=tuple(WeightedAdapter(adapter, weight) for adapter, weight in parts),
    )


def answers(core: EngineCore, requests: list[GenerateRequest]) -> dict[str, Answer | Exception]:
    for request in requests:
        core.submit(request)
    got: dict[str, Any] = {request.request_id: [] for request in requests}
    while core.has_work:
        for emission in core.step():
            name = emission.sequence.request_id
            got[name] = emission.error if emission.error is not None else [*got[name], emission.sampled]
    return {name: _answer(sampled) if isinstance(sampled, list) else sampled for name, sampled in got.items()}


def _answer(sampled: list[Any]) -> Answer:
    rows = torch.empty(len(sampled), 128)
    for row, one in enumerate(sampled):
        for token, logprob in one.logprobs.top:
            rows[row, token] = logprob
    return Answer([one.token_id for one in sampled], rows)


def summed(base: Path, parts: list[tuple[Adapter, float]]) -> Any:
    """PEFT's own weighted sum of B·A: `cat` lays the adapters' ranks side by side."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, parts[0][0].path, parts[0][0].name)
    for adapter, _ in parts[1:]:
        model.load_adapter(adapter.path, adapter.name)
    names, weights = [adapter.name for adapter, _ in parts], [weight for _, weight in parts]
    model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
    model.set_adapter("sum")
    return model.eval()


def hold(answer: Answer | Exception, model: Any, prompt: tuple[int, ...], **options: Any) -> None:
    assert isinstance(answer, Answer), answer
    expected = expected_logprobs(model, Asked("", prompt, None), answer.tokens, **options)
    assert relative_error(answer, expected) <= TOLERANCE
    assert expected.argmax(-1).tolist() == answer.tokens


def test_composition_is_pefts_weighted_sum_beside_others(
    core: EngineCore, base: Path, trained: dict[str, Trained]
) -> None:
    one, two = trained["one"].adapter, trained["two"].adapter
    mixes = {"even": [(one, 1.0), (two, 1.0)], "odd": [(one, 0.3), (two, 0.9)], "single": [(two, 0.5)]}
    requests = [
        composed(f"{name}-{number}", prompt, *parts)
        for number, prompt in enumerate(prompts(4)[:3]) for name, parts in mixes.items()
    ]  # fmt: skip
    requests += [composed(f"alone-{number}", prompt, (two, 1.0)) for number, prompt in enumerate(prompts(4)[:3])]
    found = answers(core, requests)
    for number, prompt in enumerate(prompts(4)[:3]):
        for name, parts in mixes.items():
            hold(found[f"{name}-{number}"], summed(base, parts), prompt)
        hold(found[f"alone-{number}"], trained["two"].model, prompt)


def test_composition_shares_no_prefix_with_other_weights(core: EngineCore, trained: dict[str, Trained]) -> None:
    one, two = trained["one"].adapter, trained["two"].adapter
    prompt = prompts(6)[2]
    for number, weights in enumerate([(1.0, 1.0), (1.0, 1.0), (1.0, 0.5)]):
        before = core.stats().total_cached_prompt_tokens
        answers(core, [composed(f"{number}", prompt, (one, weights[0]), (two, weights[1]))])
        assert (core.stats().total_cached_prompt_tokens > before) == (number == 1)


def test_refused_compositions_name_the_reason_and_disturb_nobody(
    core: EngineCore, base: Path, trained: dict[str, Trained]
) -> None:
    one, norms, prompt = trained["one"].adapter, trained["norms"].adapter, prompts(7)[1]
    dora = trained["dora"].adapter
    refused = [composed("refused", prompt, (one, 1.0), (norms, 1.0)), composed("dora", prompt, (dora, 0.5), (one, 1.0))]
    found = answers(core, [*refused, composed("fine", prompt, (one, 1.0))])
    assert "dora is a DoRA, whose change is not a sum of B·A" in str(found["dora"])
    assert isinstance(found["refused"], AdapterUnsupported)
    assert "norms changes model.layers.0.input_layernorm otherwise than by adding B·A" in str(found["refused"])
    hold(found["fine"], trained["one"].model, prompt)
    for parts, says in [
        ([(one, 1.0), (one, 0.5)], "names one adapter twice"),
        ([(one, float("nan"))], "weights must be finite"),
    ]:
        with pytest.raises(InvalidRequest, match=says):
            core.submit(composed("invalid", prompt, *parts))
    assert core.blocks.num_used == 0
    assert not core.has_work


def test_composition_larger_than_the_device_is_refused(base: Path, trained: dict[str, Trained]) -> None:
    core = make_core(base, num_blocks=None, device_bytes=2**20)
    parts = [(_padded(trained["two"].adapter, base, number), 1.0) for number in range(12)]
    found = answers(core, [composed("large", prompts(8)[0], *parts)])
    assert isinstance(found["large"], AdapterTooLarge)
    assert "adapters.device_bytes" in str(found["large"])


def _padded(adapter: Adapter, base: Path, number: int) -> Adapter:
    """The same files as another adapter."""
    path = base.parent / f"copy-{number}"
    shutil.copytree(adapter.path, path)
    return Adapter(id=f"sha-copy-{number}", name=path.name, path=str(path))


@pytest.mark.parametrize("chunk", [5, 48])
def test_activated_lora_acts_from_its_last_invocation_on(chunk: int, base: Path, trained: dict[str, Trained]) -> None:
    core = make_core(base, num_blocks=None, max_batch_tokens=chunk)
    activated, plain = trained["activated"], trained["one"]
    before, after = prompts(9)[1], prompts(9)[0]
    cases = {
        "twice": (*INVOCATION, *before, *INVOCATION, *after),
        "end": (*before, *INVOCATION),
        "start": (*INVOCATION, *after),
        "never": before,
    }
    found = answers(core, [composed(name, prompt, (activated.adapter, 1.0)) for name, prompt in cases.items()]
                    + [composed("plain", before, (plain.adapter, 1.0))])  # fmt: skip
    for name, prompt in cases.items():
        answer = found[name]
        assert isinstance(answer, Answer)
        offset = {"twice": 8, "end": 3, "start": 8, "never": None}[name]
        offsets = [None if offset is None else offset + len(answer.tokens) - 1]
        hold(answer, activated.model, prompt, alora_offsets=offsets)
    hold(found["plain"], plain.model, before)


def test_activated_lora_shares_the_bases_prefix(core: EngineCore, base: Path, trained: dict[str, Trained]) -> None:
    long, activated = prompts(10)[2], trained["activated"]
    answers(core, [composed("base", long)])
    before = core.stats().total_cached_prompt_tokens
    prompt = (*long, *INVOCATION, *prompts(10)[0])
    found = answers(core, [composed("first", prompt, (activated.adapter, 1.0))])
    assert core.stats().total_cached_prompt_tokens - before == len(long) // 4 * 4  # every whole block of the base's
    answer = found["first"]
    assert isinstance(answer, Answer)
    hold(answer, activated.model, prompt, alora_offsets=[8 + len(answer.tokens) - 1])
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    hold(answers(core, [composed("again", prompt)])["again"], model.eval(), prompt)


def test_activated_lora_with_more_than_linear_layers_is_refused(base: Path, core: EngineCore) -> None:
    feature = Feature("odd", 2, lambda model: {**attention_only(model), "modules_to_save": ["lm_head"]})
    adapter = make_feature_adapter(base, feature, base.parent / "odd").adapter
    path = Path(adapter.path) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alora_invocation_tokens": INVOCATION}))
    error = answers(core, [composed("odd", prompts(1)[0], (adapter, 1.0))])["odd"]
    assert isinstance(error, AdapterUnsupported)
    assert "alora_invocation_tokens is not supported with changes to lm_head" in str(error)
