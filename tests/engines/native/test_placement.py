"""Where the weights of linear layers lie."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex.engines.native.placement import place_weights

LINE = 64
NUM_LINEAR = 2 * 7  # of each of two layers: q, k, v, o, gate, up, down


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


def test_weights_of_a_file_begin_on_lines_and_keep_their_numbers(tmp_path: Path) -> None:
    path = a_checkpoint(tmp_path, tied=False)
    model, expected = read(path), {name: tensor.clone() for name, tensor in read(path).state_dict().items()}
    layers = [*linear_of(model).values()]
    unused = layers.pop(3).weight
    linear, elsewhere = [layer.weight for layer in layers], unused.data_ptr()
    assert {weight.data_ptr() % LINE for weight in linear} != {0}  # so that there is something to do
    moved = place_weights(model, layers)
    assert len(linear) == NUM_LINEAR
    assert unused.data_ptr() == elsewhere
    assert {weight.data_ptr() % LINE for weight in linear} == {0}
    assert moved == sum(weight.nbytes for weight in linear)  # each is a number of whole lines here
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_an_embedding_that_is_the_last_layer_too_stays_one_with_it(tmp_path: Path) -> None:
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
    assert place_weights(nn.LayerNorm(8), [nn.Identity()]) == 0


def test_layers_that_share_memory_with_another_tensor_stay_where_they_are() -> None:
    model: Any = nn.Sequential(*[nn.Linear(4096, 64) for _ in range(4)])
    shared = torch.randn(192, 4096)
    expected = shared.clone()
    parts = [slice(0, 64), slice(64, 128)]
    for layer, part in zip(model, parts, strict=False):
        layer.weight = nn.Parameter(shared[part])
    model.register_buffer("whole", shared[:130])
    model[2].weight = nn.Parameter(shared[128:])
    assert place_weights(model, model) == model[3].weight.nbytes
    assert torch.equal(shared, expected)
    for layer, part in zip(model, [*parts, slice(128, 192)], strict=False):
        assert layer.weight.data_ptr() == shared[part].data_ptr()


def test_weights_that_were_made_up_while_inferring_stay_where_they_are() -> None:
    """As those of checkpoints that are unpacked in the model's first step."""
    layer = nn.Linear(4096, 64)
    with torch.inference_mode():
        layer.weight = nn.Parameter(torch.randn(64, 4096), requires_grad=False)
    elsewhere = layer.weight.data_ptr()
    assert place_weights(layer, [layer]) == 0
    assert layer.weight.data_ptr() == elsewhere
