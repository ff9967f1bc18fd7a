"""Adapters saved around PEFT: a trainer's state dict, with the adapter's and the wrappers' names in it, or fewer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cells import make_base, make_core, run_few
from conformance.features import Feature, make_feature_adapter
from safetensors.torch import save_file
from support.models import llama_config
from torch import Tensor

from loraplex.engines.native.core import EngineCore
from loraplex.engines.protocol import Adapter

pytestmark = pytest.mark.usefixtures("quiet")

QV = ["q_proj", "v_proj"]
# How PEFT is asked, by what has names of its own in a state dict.
FORMS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": QV},
    "dora": {"target_modules": QV, "use_dora": True},
    "lora-bias": {"target_modules": QV, "lora_bias": True},
    "embeddings": {"target_modules": [*QV, "embed_tokens"]},
    "saved": {"target_modules": QV, "modules_to_save": ["lm_head", "norm"]},
    "saved-parents": {"target_modules": QV, "modules_to_save": ["mlp"]},
    "tokens": {"target_modules": QV, "trainable_token_indices": [50, 3]},
    "tokens-of-head": {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [50, 3], "lm_head": [50, 3]}},
}


@dataclass(frozen=True)
class Served:
    """A base's directory, and what serves it."""

    base: Path
    core: EngineCore


@pytest.fixture(scope="module", params=["untied", "tied"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    base = tmp_path_factory.mktemp("names") / "base"
    is_tied = request.param == "tied"
    make_base(llama_config(num_hidden_layers=2, vocab_size=264, tie_word_embeddings=is_tied), base)
    core = make_core(base, num_blocks=None)
    yield Served(base, core)
    core.adapters.close()


def _whole(model: Any) -> dict[str, Tensor]:
    """What `model.state_dict()` gives, the base's weights with it."""
    return dict(model.state_dict())


def _trained(model: Any) -> dict[str, Tensor]:
    """What sharded trainers write: parameters with a gradient, those that are tied once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _compiled(model: Any) -> dict[str, Tensor]:
    return _trained(torch.compile(model))


def _in_parallel(model: Any) -> dict[str, Tensor]:
    return {f"module.{name}": parameter for name, parameter in _trained(model).items()}


def _without_peft(model: Any) -> dict[str, Tensor]:
    """Of a model whose layers were replaced in place."""
    return {name.removeprefix("base_model.model."): parameter for name, parameter in _trained(model).items()}


CASES = {f"{form}-whole": (form, _whole) for form in FORMS} | {
    "dora-trained": ("dora", _trained),
    "saved-compiled": ("saved", _compiled),
    "tokens-in-parallel": ("tokens", _in_parallel),
    "embeddings-without-peft": ("embeddings", _without_peft),
}


@pytest.mark.filterwarnings("ignore")  # of PEFT, about tied weights
@pytest.mark.parametrize("case", CASES)
def test_state_dict_is_served_as_the_model_computes_it(served: Served, tmp_path: Path, case: str) -> None:
    form, way = CASES[case]
    trained = make_feature_adapter(served.base, Feature(form, 4, lambda model: FORMS[form]), tmp_path)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in way(trained.model).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapter = Adapter(id=case, name=case, path=trained.adapter.path)
    outcome = run_few(served.core, adapter, trained.model)
    assert outcome.is_exact
    assert outcome.changed
