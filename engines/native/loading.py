"""Settings -> Machine: the model, its KV cache and its adapter arena in memory, sized for this computer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from loraplex.config.settings import EngineSettings, Settings
from loraplex.engines.adapters.arena import Arena
from loraplex.engines.adapters.peft import Base
from loraplex.engines.context_length import context_length
from loraplex.engines.errors import ModelNotServable
from loraplex.engines.native.attention import PagedAttention
from loraplex.engines.native.defaults import sampling_defaults
from loraplex.engines.native.dense import multiplies_well, use_dense_kernel
from loraplex.engines.native.gates import use_gate_kernel
from loraplex.engines.native.memory import free_bytes, require_room_for_weights
from loraplex.engines.native.model import (
    DTYPES,
    base_of,
    choose_device,
    dry_run,
    load_model,
    refuse_long_context,
    use_device,
)
from loraplex.engines.native.norms import use_norm_kernel
from loraplex.engines.native.placement import place_weights
from loraplex.engines.native.quantization import layers_to_round, require_quantizable
from loraplex.engines.native.reference import compare_with_reference
from loraplex.engines.native.rotary import use_rotary_kernel
from loraplex.engines.native.runner import Runner
from loraplex.engines.native.threads import choose_num_threads, num_cores
from loraplex.engines.native.tiles import choose_tile
from loraplex.engines.protocol import EngineInfo, Progress, SamplingDefaults
from loraplex.kernels.triton_support import is_available

# The most that an unset kv_cache_bytes may take of what is free beside the weights and the adapters' arena.
KV_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Machine:
    """What a core needs of the hardware side. `arena_capacity` is in elements of the compute type."""

    settings: Settings
    info: EngineInfo
    eos_token_ids: frozenset[int]
    runner: Runner
    arena: Arena
    arena_capacity: int
    num_kv_blocks: int
    base: Base


def load_machine(settings: Settings, on_progress: Callable[[Progress], None]) -> Machine:
    """Load everything, to be used by the calling thread. Raises ModelNotServable with the reason."""
    torch.set_num_threads(settings.engine.num_threads or min(torch.get_num_threads(), num_cores()))
    device = choose_device(settings.model.device)
    use_device(device)
    require_quantizable(settings.model, device)
    attention = PagedAttention()
    require_room_for_weights(settings.model.directory, DTYPES.get(settings.model.dtype), device)
    on_progress(Progress(stage="reading weights", fraction=0.2))
    model = load_model(settings.model, device, attention)
    on_progress(Progress(stage="checking the model", fraction=0.7))
    trial = dry_run(model, attention)
    layers = [layer for layer, _ in trial.layers.values()]
    panels = place_weights(model, layers, layers_to_round(settings.model, model, layers))
    use_dense_kernel(model, panels, always=settings.engine.deterministic)
    uses_kernels = _uses_kernels(settings.engine, device)
    use_norm_kernel(model, uses_kernels=uses_kernels)
    use_gate_kernel(model, uses_kernels=uses_kernels)
    use_rotary_kernel(model, uses_kernels=uses_kernels)
    if settings.engine.num_threads is None:
        choose_num_threads(model, replays=not settings.engine.enforce_eager and not settings.engine.deterministic)
    num_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    max_len = context_length(settings.model.max_model_len, num_positions)
    refuse_long_context(model, attention, max_len)
    block_size = settings.engine.kv_block_size
    free = free_bytes(model.device)
    arena_bytes = settings.adapters.device_room(free)
    num_blocks = _num_kv_blocks(settings.engine, attention, model, max_len, free, arena_bytes)
    attention.allocate(num_blocks * block_size, model.dtype, device)
    capacity = arena_bytes // model.dtype.itemsize
    arena = Arena(capacity, model.dtype, device)
    info = EngineInfo(
        engine="native",
        base_model=settings.model.name,
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(device),
        vocab_size=model.config.get_text_config().vocab_size,
        max_model_len=min(max_len, num_blocks * block_size),
        num_parameters=model.num_parameters(),
        kv_block_size=block_size,
        num_kv_blocks=num_blocks,
        embedding_width=trial.embedding_width,
        sampling_defaults=sampling_defaults(settings.model.directory)
        if settings.model.generation_config == "auto"
        else SamplingDefaults(),
    )
    base = base_of(model, trial, settings.adapters.max_rank)
    runner = Runner(
        model, trial, attention, arena, num_blocks, block_size,
        uses_kernels=uses_kernels, uses_gemms=multiplies_well(model.dtype, device),
        replays=not settings.engine.enforce_eager,
    )  # fmt: skip
    if uses_kernels:
        on_progress(Progress(stage="compiling kernels", fraction=0.9))
        runner.compile_kernels(settings.adapters.max_rank)
    if settings.engine.deterministic:
        runner.tile = choose_tile(model, trial, runner, block_size, num_blocks)
    compare_with_reference(model, trial, runner, block_size, num_blocks)
    return Machine(settings, info, _eos_token_ids(model), runner, arena, capacity, num_blocks, base)


def _uses_kernels(engine: EngineSettings, device: torch.device) -> bool:
    """Whether Triton computes LoRA, attention and norms. Raises ModelNotServable where it is asked for and cannot."""
    if engine.kernels == "triton" and not is_available(device):
        raise ModelNotServable(f"engine.kernels = 'triton' needs a CUDA device, and the model is on {device}")
    if engine.kernels == "triton" and engine.deterministic:
        raise ModelNotServable("engine.deterministic computes with engine.kernels = 'torch' alone")
    return engine.kernels == "triton" or (
        engine.kernels == "auto" and device.type == "cuda" and not engine.deterministic
    )


def _num_kv_blocks(
    settings: EngineSettings, attention: PagedAttention, model: PreTrainedModel, max_len: int, free: int, arena: int
) -> int:
    """Enough for `max_running` full-length sequences, within `kv_cache_bytes` or a share of what is free.

    `free` are the bytes beside the weights, of which the adapters' arena takes `arena`.
    Raises ModelNotServable where the arena and one block do not fit into that.
    """
    numbers = sum(shape.num_heads * (shape.key_width + shape.value_width) for shape in attention.shapes)
    block_bytes = numbers * settings.kv_block_size * model.dtype.itemsize
    if free - arena < (settings.kv_cache_bytes or block_bytes):
        raise ModelNotServable(
            f"{arena} bytes for adapters (adapters.device_bytes or device_share) and a KV cache of "
            f"{settings.kv_cache_bytes or block_bytes} bytes do not fit beside the weights: "
            f"{free} bytes are free on {model.device}"
        )
    room = settings.kv_cache_bytes or int((free - arena) * KV_SHARE)
    blocks_per_sequence = -(-max_len // settings.kv_block_size)
    num_blocks = min(room // block_bytes, blocks_per_sequence * settings.max_running)
    if num_blocks < 1:
        raise ModelNotServable(f"one KV block takes {block_bytes} bytes, and there is room for {room}")
    return num_blocks


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """The generation config's (transformers derives one from config.json where no file is)."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset([eos] if isinstance(eos, int) else eos or [])
