"""Bases whose weights are rounded at start, against transformers and PEFT over weights that bitsandbytes rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from support.core import prompt_of, request, run, tokens
from support.cpu_flags import can_use_panels
from support.models import Oracle
from support.worlds import SmallWorld
from torch import nn
from transformers import AutoModelForCausalLM

from loraplex.config.settings import Model
from loraplex.engines.errors import ModelNotServable
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.loading import load_machine
from loraplex.engines.native.quantization import require_quantizable
from loraplex.engines.pages import unwritten_files
from loraplex.kernels.dense.linear import is_available

pytestmark = pytest.mark.skipif(
    not is_available(torch.float32, torch.device("cpu")) or not can_use_panels(),
    reason="no kernel was built, or this CPU has no AVX2",
)

ADAPTERS = [None, "rank-4", "rank-16-rslora", "rank-64-mlp"]


def make_core(small: SmallWorld, dtype: str = "float32", **engine: Any) -> EngineCore:
    settings = small.settings(**engine)
    model = msgspec.structs.replace(settings.model, quantization="int8", dtype=dtype)
    return EngineCore(load_machine(msgspec.structs.replace(settings, model=model), lambda progress: None))


def make_rounded(small: SmallWorld, path: Path, dtype: torch.dtype) -> Oracle:
    """The base in this type with the weights of its linear layers rounded, but those of the last."""
    functional = pytest.importorskip("bitsandbytes.functional")
    model: Any = AutoModelForCausalLM.from_pretrained(small.directory, dtype=dtype)
    model.float()
    for layer in model.model.modules():
        if isinstance(layer, nn.Linear):
            steps, largest, _ = functional.int8_vectorwise_quant(layer.weight.data)
            layer.weight.data = steps.float() * (largest / 127)[:, None]
    model.save_pretrained(path)
    return Oracle(path)


@pytest.fixture(scope="module")
def rounded(small: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_rounded(small, tmp_path_factory.mktemp("rounded"), torch.float32)


@pytest.mark.parametrize(
    "options", [{}, {"enforce_eager": True}, {"deterministic": True}], ids=["usual", "eager", "deterministic"]
)
def test_rounded_base_gives_what_peft_gives_over_it(
    small: SmallWorld, rounded: Oracle, options: dict[str, Any]
) -> None:
    core = make_core(small, **options)
    for round_ in range(2):
        for number, name in enumerate(ADAPTERS):
            adapter = small.adapters[name] if name else None
            core.submit(request(str(number), prompt_of(number, 9 + 20 * round_), adapter, num_logprobs=1))
        found = run(core)
        for number, name in enumerate(ADAPTERS):
            adapter, prompt = small.adapters[name] if name else None, prompt_of(number, 9 + 20 * round_)
            told = tokens(found[str(number)])
            assert rounded.agrees(prompt, told, 12, adapter), name
            expected = rounded.logits([*prompt, *told], adapter).log_softmax(-1)[len(prompt) - 1 : -1]
            wanted = expected.gather(1, torch.tensor(told)[:, None])[:, 0]
            heard = [e.sampled.logprobs.logprob for e in found[str(number)] if e.sampled and e.sampled.logprobs]
            torch.testing.assert_close(torch.tensor(heard), wanted, rtol=0, atol=1e-4)


def test_rounding_is_not_nothing(small: SmallWorld, rounded: Oracle) -> None:
    """Or the test above could not tell: its tolerance is far below what rounding changes."""
    prompt = prompt_of(0, 9)
    before, after = (oracle.logits(prompt, None).log_softmax(-1) for oracle in (small.oracle, rounded))
    assert (before - after).abs().max() > 1e-2


def test_weights_that_are_asked_for_are_those_of_the_file(small: SmallWorld) -> None:
    """Which gave back its pages: DoRA's norms are of the weights as they were."""
    core = make_core(small)
    runner = core._machine.runner
    expected: Any = AutoModelForCausalLM.from_pretrained(small.directory, dtype=torch.float32)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(runner._model.state_dict()[name], tensor), name
    first = runner._model.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert any(first in file for file in unwritten_files())


def test_bfloat16_is_as_near_as_transformers_in_bfloat16(small: SmallWorld, tmp_path: Path) -> None:
    """Twice its error: which way single numbers round is chance, and theirs are the largest of few."""
    rounded = make_rounded(small, tmp_path, torch.bfloat16)
    core, theirs = make_core(small, dtype="bfloat16"), Oracle(tmp_path, torch.bfloat16)
    ours, errors = [], []
    for number, name in enumerate(ADAPTERS):
        adapter, prompt = small.adapters[name] if name else None, prompt_of(number, 9)
        core.submit(request("one", prompt, adapter, num_logprobs=1))
        found = run(core)["one"]
        told = torch.tensor(tokens(found))
        exact, rough = (
            oracle.logits([*prompt, *told.tolist()], adapter).float().log_softmax(-1)[len(prompt) - 1 : -1]
            for oracle in (rounded, theirs)
        )
        heard = torch.tensor([e.sampled.logprobs.logprob for e in found if e.sampled and e.sampled.logprobs])
        ours.append(float((heard - exact.gather(1, told[:, None])[:, 0]).abs().max()))
        errors.append(float((rough - exact).gather(1, told[:, None]).abs().max()))
    assert max(ours) < 2 * max(errors)


def test_gpu_is_refused_before_anything_is_read() -> None:
    settings = Model(path="/nowhere", name="base", quantization="int8")
    with pytest.raises(ModelNotServable, match=r"model\.quantization = 'int8' .*the model is to be on cuda:0"):
        require_quantizable(settings, torch.device("cuda:0"))
    require_quantizable(settings, torch.device("cpu"))


def test_model_without_weights_to_round_is_refused(small: SmallWorld) -> None:
    with pytest.raises(ModelNotServable, match=r"no weights to round: .*linear layers in float16"):
        make_core(small, dtype="float16")
