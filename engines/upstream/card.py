"""What an adapter's files say of themselves, read without torch; whether they fit the base the upstream finds out."""

from __future__ import annotations

import math
from pathlib import Path

from loraplex.engines.adapters.config import read_config
from loraplex.engines.adapters.safetensors_header import read_header
from loraplex.engines.adapters.tensor_names import names_of_peft
from loraplex.engines.errors import AdapterInvalid, AdapterNotFound, AdapterTooLarge
from loraplex.engines.protocol import Adapter, AdapterCard, Variant

_A = (".lora_A.weight", ".lora_A", ".lora_embedding_A")


def card_of(adapter: Adapter, max_rank: int) -> AdapterCard:
    """Raises AdapterError."""
    directory = Path(adapter.path)
    if not directory.is_dir():
        raise AdapterNotFound("the adapter's files are gone")
    config = read_config(directory)
    try:
        header = read_header(directory / "adapter_model.safetensors")
    except OSError as error:
        raise AdapterInvalid(f"adapter_model.safetensors cannot be read: {error.strerror}") from error
    rank = max((config.rank, *config.rank_pattern.values()))
    if rank > max_rank:
        raise AdapterTooLarge(f"rank {rank} exceeds adapters.max_rank = {max_rank}")
    variant: Variant = "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"
    modules = [name for name in names_of_peft(header) if name.endswith(_A)]
    return AdapterCard(
        adapter_id=adapter.id,
        rank=rank,
        variant=variant,
        target_modules=tuple(sorted({_module(name) for name in modules})),
        num_modules=len(modules),
        num_parameters=sum(math.prod(tensor.shape) for tensor in header.values()),
        num_bytes=sum(tensor.end - tensor.begin for tensor in header.values()),
    )


def _module(name: str) -> str:
    """`q_proj` of `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`."""
    return name.partition(".lora_")[0].rpartition(".")[2]
