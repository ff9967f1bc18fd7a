"""Merges against PEFT's own functions on the same products, and against its `add_weighted_adapter`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex.config.settings import Adapters
from loraplex.engines.adapters.merge import TOLERANCE, factors_of, merge, merged_deltas
from loraplex.engines.adapters.recipe import MergePart, MergeRecipe, SignMethod, Strategy
from loraplex.engines.adapters.store import AdapterStore
from loraplex.engines.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterMismatch,
    AdapterTooLarge,
    AdapterUnsupported,
)

MODULES = {"model.layers.0.self_attn.q_proj": (24, 16), "model.layers.1.mlp.down_proj": (16, 40)}
PREFIX = "base_model.model."


def write_lora(directory: Path, seed: int, rank: int, modules: Any = MODULES, **config: Any) -> Path:
    """A LoRA of random matrices; `modules` maps names to (out, in)."""
    torch.manual_seed(seed)
    directory.mkdir(parents=True)
    tensors = {}
    for module, (size_out, size_in) in modules.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, size_in)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(size_out, rank)
    save_file(tensors, directory / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 12, "target_modules": sorted(modules), **config}
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return directory


def delta_of(directory: Path, module: str) -> Tensor:
    """scale·B·A by hand."""
    config = json.loads((directory / "adapter_config.json").read_text())
    pattern = {key.replace("\\", ""): value for key, value in config.get("rank_pattern", {}).items()}
    rank = pattern.get(module, config["r"])
    alpha = {key.replace("\\", ""): value for key, value in config.get("alpha_pattern", {}).items()}
    scale = alpha.get(module, config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)
    tensors = load_file(directory / "adapter_model.safetensors")
    b, a = (tensors[f"{PREFIX}{module}.lora_{half}.weight"] for half in "BA")
    assert a.shape[0] == rank
    product: Tensor = scale * (b @ a)
    return product


def recipe(parts: list[Path], strategy: Strategy, density: float = 0.4, sign: SignMethod = "total") -> MergeRecipe:
    weights = (1.0, -0.5, 2.0)
    return MergeRecipe(
        parts=tuple(
            MergePart(adapter_id=part.name * 4, path=str(part), weight=weight)
            for part, weight in zip(parts, weights, strict=False)
        ),
        strategy=strategy,
        density=density,
        sign_method=sign,
        max_rank=128,
    )


def by_peft(deltas: list[Tensor], weights: Tensor, wanted: MergeRecipe) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density")
        if wanted.strategy == "dare_linear":
            return merge_utils.dare_linear(deltas, weights, wanted.density)
        function = merge_utils.ties if wanted.strategy == "ties" else merge_utils.dare_ties
        merged: Tensor = function(deltas, weights, wanted.density, wanted.sign_method)
        return merged


@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties"])
def test_merge_is_pefts_on_the_same_products(
    tmp_path: Path, strategy: Strategy, sign: SignMethod, density: float
) -> None:
    """Ranks, scales and modules differ; chance is drawn in the order in which PEFT draws it."""
    parts = [
        write_lora(tmp_path / "a", 1, 4),
        write_lora(tmp_path / "b", 2, 7, use_rslora=True),
        write_lora(tmp_path / "c", 3, 2, dict([next(iter(MODULES.items()))]), lora_alpha=3),
    ]
    wanted = recipe(parts, strategy, density, sign)
    (tmp_path / "out").mkdir()
    merge(wanted, tmp_path / "out")
    torch.manual_seed(wanted.seed)
    for module in sorted(MODULES):
        having = [part for part in wanted.parts if module in _modules(Path(part.path))]
        deltas = [delta_of(Path(part.path), module) for part in having]
        expected = by_peft(deltas, torch.tensor([part.weight for part in having]), wanted)
        difference = torch.linalg.norm(delta_of(tmp_path / "out", module) - expected)
        assert difference <= 2 * TOLERANCE * torch.linalg.norm(expected), module


def test_merge_of_a_state_dict_is_that_of_what_peft_saves(tmp_path: Path) -> None:
    parts = [write_lora(tmp_path / "a", 1, 4), write_lora(tmp_path / "b", 2, 7)]
    for out in ("plain", "named"):
        (tmp_path / out).mkdir()
        merge(recipe(parts, "ties"), tmp_path / out)
        file = parts[0] / "adapter_model.safetensors"
        named = {
            key.removeprefix(PREFIX).replace(".weight", ".default.weight"): t for key, t in load_file(file).items()
        }
        save_file(named, file)
    one, other = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("plain", "named"))
    assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())


def test_merge_is_pefts_add_weighted_adapter(tmp_path: Path) -> None:
    """The whole way, as PEFT does it on a model: `ties_svd` with as many singular values as there are."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(12, 20, bias=False), torch.nn.Linear(20, 12, bias=False)

    model = peft.get_peft_model(Block(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["first", "second"]), "one")
    model.add_adapter("two", peft.LoraConfig(r=5, lora_alpha=2, use_rslora=True, target_modules=["first", "second"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.save_pretrained(str(tmp_path))
    parts = [tmp_path / "one", tmp_path / "two"]
    model.add_weighted_adapter(
        ["one", "two"], [1.0, -0.5], "merged", "ties_svd", svd_rank=12, density=0.4, majority_sign_method="frequency"
    )
    (tmp_path / "out").mkdir()
    merge(recipe(parts, "ties", 0.4, "frequency"), tmp_path / "out")
    for module in ("first", "second"):
        expected = getattr(model.base_model.model, module).get_delta_weight("merged")
        torch.testing.assert_close(delta_of(tmp_path / "out", module), expected, rtol=1e-3, atol=1e-3)


def test_rank_is_no_larger_than_it_must_be() -> None:
    torch.manual_seed(0)
    delta = torch.randn(40, 5) @ torch.randn(5, 30)
    a, b = factors_of(delta, 128)
    assert a.shape == (5, 30)
    assert torch.linalg.norm(b @ a - delta) <= TOLERANCE * torch.linalg.norm(delta)
    a, b = factors_of(delta, 2)
    best = torch.linalg.svdvals(delta)[2:].square().sum().sqrt()
    torch.testing.assert_close(torch.linalg.norm(b @ a - delta), best, rtol=1e-4, atol=0)
    assert factors_of(torch.zeros(4, 6), 8)[0].shape == (1, 6)


def test_large_matrices_are_decomposed_to_the_leading_part() -> None:
    torch.manual_seed(0)
    delta = torch.randn(1100, 6) @ torch.randn(6, 1050)
    a, b = factors_of(delta, 32)
    assert a.shape[0] == 6
    assert torch.linalg.norm(b @ a - delta) <= 10 * TOLERANCE * torch.linalg.norm(delta)


def test_chance_is_the_recipes_own() -> None:
    torch.manual_seed(5)
    deltas = [torch.randn(30, 30) for _ in range(2)]
    wanted = MergeRecipe(parts=(), strategy="dare_linear", density=0.5, sign_method="total", max_rank=8)
    first, second = (
        merged_deltas(deltas, [1.0, 1.0], wanted, torch.Generator().manual_seed(wanted.seed)) for _ in range(2)
    )
    assert torch.equal(first, second)
    other = MergeRecipe(parts=(), strategy="dare_linear", density=0.6, sign_method="total", max_rank=8)
    assert other.seed != wanted.seed


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "ADALORA", "rank_pattern": None}, "bbbb is an AdaLoRA"),
        ({"alora_invocation_tokens": [1, 2]}, "invocation"),
        ({"modules_to_save": ["lm_head"]}, "bbbb has modules_to_save"),  # though the file has no such tensor
        ({"trainable_token_indices": [3]}, "bbbb has trainable_token_indices"),
        ({"target_parameters": ["q_proj.weight"]}, "bbbb has target_parameters"),
    ],
)
def test_what_is_no_sum_of_products_is_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    parts = [write_lora(tmp_path / "a", 1, 4), write_lora(tmp_path / "b", 2, 4, **config)]
    with pytest.raises(AdapterUnsupported, match=reason):
        merge(recipe(parts, "ties"), tmp_path)


Q = next(iter(MODULES))
A = f"{PREFIX}{Q}.lora_A.weight"


def _five_rows(tensors: dict[str, Tensor]) -> None:
    tensors[A] = torch.randn(5, 16)


def _five_columns(tensors: dict[str, Tensor]) -> None:
    tensors[A.replace("lora_A", "lora_B")] = torch.randn(24, 5)


def _second_half(tensors: dict[str, Tensor]) -> None:
    tensors[A.removesuffix(".weight")] = torch.randn(4, 16)


def _integers(tensors: dict[str, Tensor]) -> None:
    tensors[A] = torch.ones(4, 16, dtype=torch.int32)


def _flat(tensors: dict[str, Tensor]) -> None:
    tensors[A] = torch.ones(4)


# What the config says otherwise, what is done to the file, and the error.
CONTRADICTIONS: list[tuple[dict[str, Any], Callable[[dict[str, Tensor]], object], type[AdapterError], str]] = [
    ({"r": 8}, list, AdapterInvalid, r"has shape \[4, 16\]; its config says rank 8"),
    ({"rank_pattern": {"q_proj": 2}}, list, AdapterInvalid, r"q_proj in bbbb has shape \[4, 16\]; .* rank 2"),
    (
        {"target_modules": ["down_proj"]},
        list,
        AdapterInvalid,
        "for .*q_proj, which target_modules does not name",
    ),
    ({"layers_to_transform": [0]}, list, AdapterInvalid, "weights for .*down_proj, which target_modules does not name"),
    ({"exclude_modules": ["q_proj"]}, list, AdapterInvalid, "for .*q_proj, which target_modules does not name"),
    ({}, _five_rows, AdapterInvalid, r"lora_A of .*q_proj in bbbb has shape \[5, 16\]; its config says rank 4"),
    ({}, _five_columns, AdapterInvalid, r"lora_B of .*q_proj in bbbb has shape \[24, 5\]; its config says rank 4"),
    ({}, _flat, AdapterInvalid, r"has shape \[4\]"),
    ({}, _second_half, AdapterInvalid, r"two tensors for one thing: .*q_proj\.lora_A and .*q_proj\.lora_A\.weight"),
    ({}, _integers, AdapterUnsupported, r"is torch\.int32"),
    ({}, dict.clear, AdapterInvalid, "bbbb holds no LoRA weights"),
]


@pytest.mark.parametrize(("config", "change", "error", "reason"), CONTRADICTIONS)
def test_part_that_is_not_what_its_config_says_is_refused(
    tmp_path: Path,
    config: dict[str, Any],
    change: Callable[[dict[str, Tensor]], object],
    error: type[AdapterError],
    reason: str,
) -> None:
    parts = [write_lora(tmp_path / "a", 1, 4), write_lora(tmp_path / "b", 2, 4, **config)]
    tensors = load_file(parts[1] / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, parts[1] / "adapter_model.safetensors")
    with pytest.raises(error, match=reason):
        merge(recipe(parts, "ties"), tmp_path)


def test_adapters_of_different_bases_are_refused(tmp_path: Path) -> None:
    other = {name: (size_out + 1, size_in) for name, (size_out, size_in) in MODULES.items()}
    parts = [write_lora(tmp_path / "a", 1, 4), write_lora(tmp_path / "b", 2, 4, other)]
    with pytest.raises(AdapterMismatch, match="different bases"):
        merge(recipe(parts, "ties"), tmp_path)


async def test_store_merges_once_and_tells_what_cannot_be(store: AdapterStore, root: Path, settings: Adapters) -> None:
    stored = [
        await store.fetch(str(write_lora(root / name, seed, seed, **config)), name)
        for name, seed, config in (("a", 2, {}), ("b", 3, {}), ("dora", 4, {"use_dora": True}))
    ]
    parts = [MergePart(adapter_id=one.adapter.id, path=one.adapter.path, weight=1.0) for one in stored]
    wanted = MergeRecipe(parts=tuple(parts[:2]), strategy="ties", density=0.5, sign_method="total", max_rank=128)
    merged = await store.merge(wanted, "merged")
    assert merged.adapter.name == "merged"
    again = await store.merge(wanted, "again")
    assert (again.adapter.id, again.adapter.path) == (merged.adapter.id, merged.adapter.path)
    bad = MergeRecipe(parts=(parts[0], parts[2]), strategy="ties", density=0.5, sign_method="total", max_rank=128)
    with pytest.raises(AdapterUnsupported, match="DoRA"):
        await store.merge(bad, "bad")


def _modules(directory: Path) -> set[str]:
    return set(json.loads((directory / "adapter_config.json").read_text())["target_modules"])


def test_product_that_would_take_the_machines_memory_is_refused_before_it_is_made(tmp_path: Path) -> None:
    """Two files of a few megabytes, whose products would have 160 GB each."""
    parts = [write_lora(tmp_path / name, seed, 1, {"q_proj": (200_000, 200_000)}) for seed, name in enumerate("ab")]
    with pytest.raises(AdapterTooLarge, match=r"merging q_proj would take \d+ GiB of memory"):
        merge(recipe(parts, "ties"), tmp_path)
