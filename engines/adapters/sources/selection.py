"""Which files of a source are an adapter, and how large each may be. Anything not on this list is never fetched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from loraplex.engines.adapters.sources.base import RemoteFile
from loraplex.engines.errors import AdapterInvalid, AdapterTooLarge, AdapterUnsupported

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Largest size of each file in bytes; None leaves it to adapters.max_bytes.
WANTED: dict[str, int | None] = {
    CONFIG: 2**20,
    WEIGHTS: None,
    "tokenizer.json": 64 * 2**20,
    "tokenizer_config.json": 4 * 2**20,
    "special_tokens_map.json": 4 * 2**20,
    "added_tokens.json": 4 * 2**20,
    "chat_template.jinja": 2**20,
}
_SHARD = re.compile(r"adapter_model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def select(names: Iterable[str]) -> Sequence[str]:
    """The wanted names among those a source has, sorted.

    Raises AdapterInvalid where a necessary one lacks, AdapterUnsupported where it is in shards.
    """
    present = set(names)
    if CONFIG not in present:
        raise AdapterInvalid(f"there is no {CONFIG}; PEFT's save_pretrained writes it beside the weights")
    if WEIGHTS not in present:
        refuse_shards(present)
        pickles = sorted(name for name in present if name.endswith(_PICKLES))
        if pickles:
            raise AdapterInvalid(
                f"the weights are a pickle ({pickles[0][:80]}), which is never read because reading runs its code; "
                f"convert them to {WEIGHTS} (save_pretrained with safe_serialization=True)"
            )
        raise AdapterInvalid(f"there is no {WEIGHTS}")
    return sorted(present & WANTED.keys())


def refuse_shards(names: Iterable[str]) -> None:
    """Raises AdapterUnsupported where one is a part of weights in several files, which PEFT cannot read either."""
    if shards := sorted(name for name in names if _SHARD.fullmatch(name)):
        raise AdapterUnsupported(
            f"the weights are in several files ({shards[0][:80]}); save them in one, {WEIGHTS}: with PEFT's "
            "save_pretrained, or with transformers' and a larger max_shard_size"
        )


def check_sizes(files: Iterable[RemoteFile], max_bytes: int) -> None:
    """Raises AdapterTooLarge where one file or all together exceed their limits, in bytes."""
    total = 0
    for file in files:
        total += file.num_bytes
        limit = WANTED[file.name]
        if limit is not None and file.num_bytes > limit:
            raise AdapterTooLarge(f"{file.name} has {file.num_bytes} bytes; at most {limit} are read")
    if total > max_bytes:
        raise AdapterTooLarge(f"the files have {total} bytes together, more than adapters.max_bytes = {max_bytes}")
