"""One wrapped layer, its adapters loaded from files: what each token is given, in whichever company."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from support.adapter_files import CONFIG_NAME, WEIGHTS_NAME, write_files
from torch import Tensor, nn

from loraplex.engines.adapters import pieces
from loraplex.engines.adapters.arena import Arena
from loraplex.engines.adapters.peft import Base, BaseModule, load_adapter
from loraplex.engines.native.lora import LoraLayers
from loraplex.engines.protocol import Adapter
from loraplex.kernels.lora.decode import is_available

WIDTH, RANK = 64, 4
CPU = torch.device("cpu")
MODULE = BaseModule(index=0, name="k_proj", in_features=WIDTH, out_features=WIDTH, input=0)


def adapter_of(directory: Path, *, use_dora: bool) -> Adapter:
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["k_proj"]}
    tensors = {"lora_A.weight": torch.randn(RANK, WIDTH), "lora_B.weight": torch.randn(WIDTH, RANK)}
    if use_dora:
        tensors["lora_magnitude_vector"] = torch.rand(WIDTH) + 3.0
    files = {
        CONFIG_NAME: json.dumps({**config, "use_dora": use_dora}).encode(),
        WEIGHTS_NAME: save({f"base_model.model.k_proj.{name}": tensor for name, tensor in tensors.items()}),
    }
    return Adapter(id=directory.name, name=directory.name, path=str(write_files(directory, files)))


@pytest.fixture
def layer() -> nn.Linear:
    """Its bias is large beside what it multiplies, as in some models: (y - bias) + bias is another number than y."""
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16).requires_grad_(False)
    layer.bias.mul_(100)
    return layer


@pytest.mark.parametrize(
    ("has_kernel", "one_by_one"),
    [
        pytest.param(
            True, one_by_one, id=f"by the kernel{', one by one' * one_by_one}",
            marks=pytest.mark.skipif(not is_available(torch.bfloat16, CPU), reason="the kernel was not built"),
        )
        for one_by_one in (False, True)
    ] + [pytest.param(False, True, id="by torch, one by one")],
)  # fmt: skip
def test_doras_gain_leaves_other_tokens_their_bits(
    layer: nn.Linear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_kernel: bool, one_by_one: bool
) -> None:
    if not has_kernel:
        monkeypatch.setattr("loraplex.engines.native.lora.is_available", lambda dtype, device: False)
    arena = Arena(2**14, torch.bfloat16, CPU)
    base = Base(modules={"k_proj": MODULE}, weight=lambda index: layer.weight, dtype=torch.bfloat16, max_rank=RANK)
    for number, name in enumerate(("plain", "dora")):
        loaded = load_adapter(adapter_of(tmp_path / name, use_dora=name == "dora"), base)
        pieces.exhaust(arena.write(number * 2**13, loaded))
        arena.publish(loaded.plan, number * 2**13)
    lora = LoraLayers(arena)
    lora.wrap(layer, MODULE, behind_selection=False)
    x = torch.randn(3, WIDTH, dtype=torch.bfloat16)

    def forward(*names: str) -> Tensor:
        owners = [((name, 1.0),) if name else () for name in names]
        lora.begin(owners, range(3), CPU, one_by_one=one_by_one)
        found: Tensor = layer(x)
        return found

    with torch.inference_mode():
        alone, beside = forward("", "plain", ""), forward("", "plain", "dora")
    assert torch.equal(beside[:2], alone[:2])
    assert not torch.equal(beside[2], alone[2])
