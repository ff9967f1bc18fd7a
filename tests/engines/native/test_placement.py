"""Where the weights of linear layers lie."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cpu_flags import can_use_panels, panels_wanted
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex.engines.native.dense import use_dense_kernel
from loraplex.engines.native.placement import place_weights
from loraplex.engines.pages import unwritten_files
from loraplex.kernels.dense.linear import Linear, is_available

LINE = 64
NUM_LINEAR = 2 * 7  # of each of two layers: q, k, v, o, gate, up, down


CPU = torch.device("cpu")
NEEDS_PANELS = pytest.mark.skipif(
    not is_available(torch.bfloat16, CPU) or not can_use_panels(), reason="no kernel was built, or this CPU has no AVX2"
)


@pytest.fixture
def rows() -> Iterator[None]:
    """Weights as they lie, whatever is fastest."""
    if not is_available(torch.bfloat16, CPU):
        yield
        return
    with panels_wanted(False):
        yield


@pytest.fixture
def panels() -> Iterator[None]:
    with panels_wanted(True):
        yield


def a_checkpoint(path: Path, *, tied: bool) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=160, intermediate_size=224, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(path)
    return path


def read(path: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16, use_safetensors=True)


def linear_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def test_weights_of_a_file_begin_on_lines_and_keep_their_numbers(tmp_path: Path, rows: None) -> None:
    path = a_checkpoint(tmp_path, tied=False)
    model, expected = read(path), {name: tensor.clone() for name, tensor in read(path).state_dict().items()}
    layers = [*linear_of(model).values()]
    unused = layers.pop(3).weight
    linear, elsewhere = [layer.weight for layer in layers], unused.data_ptr()
    assert {weight.data_ptr() % LINE for weight in linear} != {0}  # so that there is something to do
    assert place_weights(model, layers) == {}
    assert len(linear) == NUM_LINEAR
    assert unused.data_ptr() == elsewhere
    assert {weight.data_ptr() % LINE for weight in linear} == {0}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_an_embedding_that_is_the_last_layer_too_stays_one_with_it(tmp_path: Path, rows: None) -> None:
    model = read(a_checkpoint(tmp_path, tied=True))
    place_weights(model, linear_of(model).values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.data_ptr() % LINE == 0


def test_neighbours_in_the_same_memory_keep_theirs() -> None:
    flat = torch.arange(3 * 64 * 4096, dtype=torch.float32)
    before, own, after = flat.view(3, 64, 4096)
    layer = nn.Linear(4096, 64, bias=False)
    layer.weight = nn.Parameter(own, requires_grad=False)
    expected = [copy.deepcopy(part) for part in (before, own, after)]
    place_weights(layer, [layer])
    for found, wanted in zip((before, layer.weight, after), expected, strict=True):
        assert torch.equal(found, wanted)


def test_nothing_is_moved_of_layers_without_weights_of_their_own() -> None:
    assert place_weights(nn.LayerNorm(8), [nn.Identity()]) == {}


def test_layers_that_share_memory_with_another_tensor_stay_where_they_are() -> None:
    model: Any = nn.Sequential(*[nn.Linear(4096, 64) for _ in range(4)])
    shared = torch.randn(192, 4096)
    expected = shared.clone()
    parts = [slice(0, 64), slice(64, 128)]
    for layer, part in zip(model, parts, strict=False):
        layer.weight = nn.Parameter(shared[part])
    model.register_buffer("whole", shared[:130])
    model[2].weight = nn.Parameter(shared[128:])
    elsewhere = model[3].weight.data_ptr()
    place_weights(model, model)
    assert model[3].weight.data_ptr() != elsewhere
    assert torch.equal(shared, expected)
    for layer, part in zip(model, [*parts, slice(128, 192)], strict=False):
        assert layer.weight.data_ptr() == shared[part].data_ptr()


def test_weights_that_were_made_up_while_inferring_stay_where_they_are() -> None:
    """As those of checkpoints that are unpacked in the model's first step."""
    layer = nn.Linear(4096, 64)
    with torch.inference_mode():
        layer.weight = nn.Parameter(torch.randn(64, 4096), requires_grad=False)
    elsewhere = layer.weight.data_ptr()
    place_weights(layer, [layer])
    assert layer.weight.data_ptr() == elsewhere


@NEEDS_PANELS
@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_a_file_are_packed_and_the_file_still_answers_for_them(
    tmp_path: Path, tied: bool, panels: None
) -> None:
    path = a_checkpoint(tmp_path, tied=tied)
    model, expected = read(path), read(path)
    layers = linear_of(model)
    elsewhere = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    packed = place_weights(model, layers.values())
    assert packed.keys() == {*layers.values()}
    assert {panels.memory.data_ptr() % LINE for panels in packed.values()} == {0}
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == elsewhere[name]
        assert torch.equal(tensor, expected.state_dict()[name]), name
    use_dense_kernel(model, packed, always=True)
    for name, layer in linear_of(expected).items():
        x = torch.randn(7, layer.in_features).bfloat16()
        wanted = Linear(layer.weight, None, packed[layers[name]])(x)
        assert torch.equal(layers[name](x), wanted), name
        torch.testing.assert_close(wanted, layer(x), rtol=2**-7, atol=1e-3)


@NEEDS_PANELS
def test_weights_that_no_file_keeps_are_moved_and_not_packed(tmp_path: Path, panels: None) -> None:
    """Such as were converted, or were written to after they were read: the file has other numbers."""
    path = a_checkpoint(tmp_path, tied=False)
    converted = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    changed = read(path)
    with torch.no_grad():
        changed.lm_head.weight[3, 3] += 1
    for model in (converted, changed):
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert place_weights(model, linear_of(model).values()) == {}
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
            assert name.endswith("norm.weight") or "embed" in name or tensor.data_ptr() % LINE == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="told by Linux alone")
def test_files_that_are_mapped_are_told_from_other_memory(tmp_path: Path) -> None:
    model = read(a_checkpoint(tmp_path, tied=False))
    places = unwritten_files()
    assert any(model.lm_head.weight.data_ptr() in place for place in places)
    assert not any(torch.ones(1 << 20).data_ptr() in place for place in places)


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError])
def test_no_file_is_known_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, error: type[OSError]) -> None:
    def refuse(path: Path) -> str:
        raise error(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert unwritten_files() == []
