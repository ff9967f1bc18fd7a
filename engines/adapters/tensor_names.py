"""The names of tensors in an adapter's file. No two of them may mean one thing: a reader would take either."""

from __future__ import annotations

import re
from typing import TypeVar

from loraplex.engines.errors import AdapterInvalid

PREFIX = "base_model.model."
_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?")

Thing = TypeVar("Thing")


def lora_part(key: str) -> tuple[str, str] | None:
    """(module, part) of a tensor's name; None for what is no A, B or magnitude."""
    match = _LORA.fullmatch(key)
    return (match["module"], match["part"]) if match else None


def claim(names: dict[Thing, str], thing: Thing, key: str) -> None:
    """Note that the tensor `key` is this thing. Raises AdapterInvalid where another one is it already."""
    if (other := names.setdefault(thing, key)) != key:
        first, second = sorted((other, key))
        raise AdapterInvalid(f"the file has two tensors for one thing: {first} and {second}")
