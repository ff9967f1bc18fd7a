"""The names of tensors in an adapter's file. No two of them may mean one thing: a reader would take either.

PEFT writes `base_model.model.MODULE.lora_A.weight`. What is saved around it (a trainer's own state dict, of one rank of
FSDP or a compiled model) has the adapter's name and the wrappers' in it as well, or PEFT's prefix left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

from loraplex.engines.adapters.safetensors_header import shown
from loraplex.engines.errors import AdapterInvalid, AdapterUnsupported

PREFIX = "base_model.model."
_PARTS = "lora_A|lora_B|lora_E|lora_magnitude_vector"
_LORA = re.compile(rf"base_model\.model\.(?P<module>.+)\.(?P<part>{_PARTS})(\.weight)?")
_NAMED = re.compile(
    rf"(?P<part>.+\.(?:{_PARTS}|lora_embedding_A|lora_embedding_B|trainable_tokens_delta))"
    r"\.(?!(?:weight|bias)$)(?P<name>[^.]+)(?P<ending>(?:\.weight|\.bias)?)"
)
# torch.compile's, FSDP's and checkpointing's; around any module, and no module of a model is called so.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = "module."  # DistributedDataParallel's and DeepSpeed's, around the whole model
_TOKENS_BASE = ".token_adapter.base_layer."  # the base's own, below a wrapper

Thing = TypeVar("Thing")


def lora_part(key: str) -> tuple[str, str] | None:
    """(module, part) of a tensor's name; None for what is no A, B, E or magnitude."""
    match = _LORA.fullmatch(key)
    return (match["module"], match["part"]) if match else None


def claim(names: dict[Thing, str], thing: Thing, key: str) -> None:
    """Note that the tensor `key` is this thing. Raises AdapterInvalid where another one is it already."""
    if (other := names.setdefault(thing, key)) != key:
        first, second = sorted((other, key))
        raise AdapterInvalid(f"the file has two tensors for one thing: {first} and {second}")


def names_of_peft(keys: Iterable[str]) -> dict[str, str]:
    """What PEFT calls each tensor -> what the file does, in the file's order.

    Raises AdapterUnsupported where there are adapters of several names, AdapterInvalid where two names are one.
    """
    keys = list(keys)
    bare = [_WRAPPERS.sub("", key) for key in keys]
    if all(name.startswith(_PARALLEL) for name in bare):
        bare = [name.removeprefix(_PARALLEL) for name in bare]
    if not any(name.startswith(PREFIX) for name in bare):
        bare = [PREFIX + name for name in bare]
    adapter = _adapter_in(bare)
    names: dict[str, str] = {}
    for key, name in zip(keys, bare, strict=True):
        claim(names, _without_adapter(name, adapter), key)
    return names


def _adapter_in(names: list[str]) -> str | None:
    found = sorted({match["name"] for match in map(_NAMED.fullmatch, names) if match})
    if len(found) > 1:
        first, second = shown(found[0]), shown(found[1])
        raise AdapterUnsupported(f"the file holds several adapters ({first}, {second}); save each by itself")
    return found[0] if found else None


def _without_adapter(name: str, adapter: str | None) -> str:
    name = name.replace(_TOKENS_BASE, ".")
    if adapter is None:
        return name
    if match := _NAMED.fullmatch(name):
        return match["part"] + match["ending"]
    return name.replace(f".modules_to_save.{adapter}.", ".")
