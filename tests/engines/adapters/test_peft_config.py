"""What an adapter's config means, against PEFT's own reading of it; and what is refused, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists

from loraplex.engines.adapters.config import read_config
from loraplex.engines.errors import AdapterError, AdapterInvalid, AdapterUnsupported

MODULES = [
    f"model.layers.{layer}.{block}.{name}"
    for layer in range(12)
    for block, name in [("self_attn", "q_proj"), ("self_attn", "k_proj"), ("mlp", "up_proj"), ("mlp.experts.3", "w1")]
] + ["lm_head"]


def write(directory: Path, **fields: Any) -> Path:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **fields}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def peft_targets(config: peft.LoraConfig, module: str) -> bool:
    """PEFT answers with True, a match, or an object that says why not."""
    found = check_target_module_exists(config, module)
    return bool(found) and "Excluded" not in type(found).__name__


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": r".*self_attn\.(q|k)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 10]},
        {"target_modules": ["w1", "q_proj"], "layers_to_transform": [3], "layers_pattern": ["layers"]},
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.1.*"},
    ],
    ids=str,
)
def test_targets_agrees_with_peft(tmp_path: Path, fields: dict[str, Any]) -> None:
    ours, theirs = read_config(write(tmp_path, **fields)), peft.LoraConfig(**fields)
    matched = [module for module in MODULES if ours.targets(module)]
    assert matched == [module for module in MODULES if peft_targets(theirs, module)]
    assert matched


def test_scale_alpha_over_rank_or_its_root(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"rank_pattern": {"k_proj": 4}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 6}}
    plain = read_config(write(tmp_path, **fields))
    assert plain.scale_of("model.layers.0.self_attn.q_proj") == 2.0
    assert plain.scale_of("model.layers.1.self_attn.q_proj") == 0.75
    assert (plain.rank_of("model.layers.0.self_attn.k_proj"), plain.scale_of("model.layers.0.self_attn.k_proj")) == (
        4,
        4,
    )
    stabilised = read_config(write(tmp_path, use_rslora=True, r=16))
    assert stabilised.scale_of("lm_head") == 4.0


def test_every_default_field_of_peft_is_accepted(tmp_path: Path) -> None:
    peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    assert read_config(tmp_path).rank == 8


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"peft_type": "IA3"}, AdapterUnsupported, "peft_type is 'IA3'"),
        ({"bias": "most"}, AdapterInvalid, "bias = 'most'"),
        ({"trainable_token_indices": [-1]}, AdapterInvalid, "trainable_token_indices"),
        ({"trainable_token_indices": {"wte": [1, 1]}}, AdapterInvalid, "names a token twice"),
        ({"init_lora_weights": "pissa"}, AdapterUnsupported, "init_lora_weights = 'pissa'"),
        ({"use_qalora": True}, AdapterUnsupported, "use_qalora"),
        ({"alora_invocation_tokens": [-1]}, AdapterInvalid, "alora_invocation_tokens = [-1]"),
        ({"alora_invocation_tokens": [1], "use_dora": True}, AdapterUnsupported, "use_dora = True"),
        ({"from_the_future": 3}, AdapterUnsupported, "from_the_future = 3"),
        ({"r": "eight"}, AdapterInvalid, "r = 'eight'"),
        ({"r": 0}, AdapterInvalid, "r = 0"),
        ({"lora_alpha": -1}, AdapterInvalid, "lora_alpha = -1"),
        ({"use_dora": "yes"}, AdapterInvalid, "use_dora = 'yes'"),
        ({"target_modules": "(q_proj"}, AdapterInvalid, "not a regular expression"),
        ({"target_modules": [1]}, AdapterInvalid, "not a list of module names"),
        ({"rank_pattern": {"q": "x"}}, AdapterInvalid, "rank_pattern"),
        ({"layers_to_transform": "all"}, AdapterInvalid, "layers_to_transform = 'all'"),
    ],
    ids=str,
)
def test_read_config_refuses_by_name(
    tmp_path: Path, fields: dict[str, Any], error: type[AdapterError], says: str
) -> None:
    with pytest.raises(error) as caught:
        read_config(write(tmp_path, **fields))
    assert says in str(caught.value)


def test_targets_pattern_that_backtracks_for_ever_is_refused(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, target_modules=r"(?:.|..|...)+(?=[A-Z])"))
    with pytest.raises(AdapterInvalid, match="takes too long"):
        config.targets("model.layers.0.self_attn.q_proj" * 3)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"peft_type": "LORA", "r": 1e400}', "[" * 100_000])
def test_read_config_not_a_usable_object_raises_invalid(tmp_path: Path, content: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterInvalid):
        read_config(tmp_path)
