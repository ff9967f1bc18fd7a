"""What the file calls its tensors, and what PEFT does."""

from __future__ import annotations

import pytest

from loraplex.engines.adapters.tensor_names import names_of_peft
from loraplex.engines.errors import AdapterInvalid, AdapterUnsupported

P, Q = "base_model.model.", "model.layers.0.self_attn.q_proj"
A, B = f"{P}{Q}.lora_A.weight", f"{P}{Q}.lora_B.weight"
HEAD, EMBEDDING = f"{P}lm_head.weight", f"{P}model.embed_tokens"
# the file's name of a tensor beside a plain A or a named one -> PEFT's
NAMED = {
    f"{P}{Q}.lora_B.default.weight": B,
    f"{P}{Q}.lora_B.default.bias": f"{P}{Q}.lora_B.bias",
    f"{P}{Q}.lora_magnitude_vector.default": f"{P}{Q}.lora_magnitude_vector",
    f"{P}{Q}.lora_magnitude_vector.default.weight": f"{P}{Q}.lora_magnitude_vector.weight",
    f"{EMBEDDING}.lora_embedding_A.default": f"{EMBEDDING}.lora_embedding_A",
    f"{EMBEDDING}.lora_embedding_B.default": f"{EMBEDDING}.lora_embedding_B",
    f"{EMBEDDING}.token_adapter.trainable_tokens_delta.default": f"{EMBEDDING}.token_adapter.trainable_tokens_delta",
    f"{EMBEDDING}.token_adapter.base_layer.weight": f"{EMBEDDING}.weight",
    f"{P}lm_head.modules_to_save.default.weight": HEAD,
    f"{P}model.layers.0.mlp.modules_to_save.default.up_proj.weight": f"{P}model.layers.0.mlp.up_proj.weight",
    f"{P}model.default.weight": f"{P}model.default.weight",
}
WRAPPED = {
    "as PEFT writes it": (A, B),
    "without the prefix": (f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"),
    "named, without the prefix": (f"{Q}.lora_A.default.weight", f"{Q}.lora_B.default.weight"),
    "compiled": (f"_orig_mod.{A}", f"_orig_mod.{B}"),
    "in parallel": (f"module.{A}", f"module.{B}"),
    "compiled, then in parallel": (f"module._orig_mod.{A}", f"module._orig_mod.{B}"),
    "in parallel, then compiled": (f"_orig_mod.module.{A}", f"_orig_mod.module.{B}"),
    "in parallel, without the prefix": (f"module.{Q}.lora_A.weight", f"module.{Q}.lora_B.weight"),
    "layers sharded": tuple(
        name.replace(".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn") for name in (A, B)
    ),
    "an adapter called weight": (f"{P}{Q}.lora_A.weight.weight", f"{P}{Q}.lora_B.weight.weight"),
}
REFUSED = {
    "two adapters": (
        (f"{P}{Q}.lora_A.one.weight", f"{P}{Q}.lora_B.two.weight"), AdapterUnsupported,
        r"several adapters \('one', 'two'\); save each by itself",
    ),
    "an adapter and a plain one": ((A, f"{P}{Q}.lora_A.default.weight"), AdapterInvalid, "two tensors for one thing"),
    "a module saved and plain": (
        (f"{P}{Q}.lora_A.default.weight", HEAD, f"{P}lm_head.modules_to_save.default.weight"), AdapterInvalid,
        "two tensors for one thing: .*lm_head.modules_to_save.default.weight and .*lm_head.weight",
    ),
    "compiled and plain": ((A, f"_orig_mod.{A}"), AdapterInvalid, "two tensors for one thing"),
}  # fmt: skip


@pytest.mark.parametrize("key", NAMED)
def test_adapters_name_is_left_out_wherever_peft_puts_it(key: str) -> None:
    assert names_of_peft([f"{P}{Q}.lora_A.default.weight", key]) == {
        A: f"{P}{Q}.lora_A.default.weight",
        NAMED[key]: key,
    }


@pytest.mark.parametrize("case", WRAPPED)
def test_wrappers_and_a_missing_prefix_are_as_none_and_as_it(case: str) -> None:
    assert names_of_peft(WRAPPED[case]) == dict(zip((A, B), WRAPPED[case], strict=True))


@pytest.mark.parametrize(
    "keys", [(A, f"{Q}.lora_B.weight"), (A, f"module.{B}"), (f"{P}gate.modules_to_save.x.weight",)], ids=str
)
def test_what_may_mean_something_else_keeps_its_name(keys: tuple[str, ...]) -> None:
    assert tuple(names_of_peft(keys)) == keys


@pytest.mark.parametrize("case", REFUSED)
def test_two_tensors_of_one_meaning_are_refused_by_name(case: str) -> None:
    keys, error, says = REFUSED[case]
    with pytest.raises(error, match=says):
        names_of_peft(keys)
