"""What an adapter's config means, against PEFT's own reading of it; and what is refused, by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from support.hostile_adapters import CONFIGS

from loraplex.engines.adapters.config import read_config
from loraplex.engines.errors import AdapterError, AdapterInvalid

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
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        {"target_modules": r".*(q_proj|up_proj|w1)", "modules_to_save": ["mlp", "norm"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "layers_pattern": ""},
        {"target_modules": ["w1", "q_proj"], "layers_to_transform": [3], "layers_pattern": ["experts", "layers"]},
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


@pytest.mark.parametrize(("fields", "error", "says"), CONFIGS, ids=str)
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


@pytest.mark.parametrize("pattern", ["(?x)q#", "(?x) q_proj #"])
def test_pattern_that_is_none_as_a_part_of_ours_is_refused(tmp_path: Path, pattern: str) -> None:
    """A comment at its end swallows what we put behind it."""
    config = read_config(write(tmp_path, target_modules=pattern))
    with pytest.raises(AdapterInvalid, match="not a regular expression"):
        config.targets("model.layers.0.self_attn.q_proj")


FIELDS = [field.name for field in dataclasses.fields(peft.AdaLoraConfig)]
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**70)
    | st.floats()
    | st.text(alphabet="(?x)[a]{9}+*|.^$#\\dq_proj", max_size=8)
    | st.sampled_from(["q_proj", "all", "gaussian", r".*layers\.1.*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.dictionaries(st.sampled_from(FIELDS), _VALUES, max_size=4), method=st.sampled_from(["LORA", "ADALORA"])
)
def test_read_config_any_fields_are_sound_or_refused_in_short(
    tmp_path: Path, fields: dict[str, Any], method: str
) -> None:
    told = ""
    try:
        config = read_config(write(tmp_path, **{**fields, "peft_type": method}))
        for module in MODULES[::5]:
            config.targets(module)
            config.saves(module)
            assert config.rank_of(module) >= 1
            assert 0 < config.scale_of(module) < float("inf")
            config.token_ids_of(module, is_input=True)
    except AdapterError as error:
        told = str(error)
    assert len(told) < 600
    assert told.isprintable()
