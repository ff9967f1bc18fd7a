"""A PEFT LoRA directory -> LoadedAdapter: one flat tensor in the arena's layout, and a table of what lies where.

Whatever the config says about scales (`alpha / r`, rsLoRA, patterns), DoRA's magnitudes and AdaLoRA's singular values
is settled here, once; after this no code knows PEFT. Every tensor of the file is used or the adapter is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loraplex.engines.adapters import pieces
from loraplex.engines.adapters.config import LoraConfig, read_config
from loraplex.engines.adapters.extras import ExtraPlan, ExtraPlanner, Shape, read_extras
from loraplex.engines.adapters.pieces import Pieces
from loraplex.engines.adapters.safetensors_header import TensorInfo, read_header
from loraplex.engines.adapters.tensor_names import PREFIX, claim, lora_part, names_of_peft
from loraplex.engines.errors import AdapterInvalid, AdapterMismatch, AdapterTooLarge, AdapterUnsupported
from loraplex.engines.protocol import Adapter, AdapterCard, Variant
from loraplex.kernels.lora.table import ALIGNMENT_BYTES

UNUSED = "is not used"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ONE_EXPERT = re.compile(r".+\.experts\.\d+\.[^.]+")


@dataclass(frozen=True, slots=True)
class BaseModule:
    """One linear layer of the base model that an adapter may target; `index` is its place in the arena's table.

    Layers of one number `input` are given one and the same tensor, as q, k and v are.
    """

    index: int
    name: str
    in_features: int
    out_features: int
    input: int


@dataclass(frozen=True, slots=True)
class ModuleEntry:
    """Where one module's matrices lie, in elements from the extent's start.

    At `a`: A, Shape [rank, in]. At `b`: Bᵀ, Shape [rank, out]. At `gain`: DoRA's magnitude / ‖W + scale·BA‖,
    Shape [out]; None without DoRA.
    """

    module: BaseModule
    rank: int
    scale: float
    a: int
    b: int
    gain: int | None

    def a_of(self, flat: Tensor) -> Tensor:
        return flat[self.a : self.a + self.rank * self.module.in_features].view(self.rank, self.module.in_features)

    def b_of(self, flat: Tensor) -> Tensor:
        return flat[self.b : self.b + self.rank * self.module.out_features].view(self.rank, self.module.out_features)

    def gain_of(self, flat: Tensor) -> Tensor | None:
        return None if self.gain is None else flat[self.gain : self.gain + self.module.out_features]


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """A valid adapter's layout: entries by module index, what else it brings, and the extent's `size` in elements.

    `tensors` are those of its file, by PEFT's names.
    """

    adapter: Adapter
    config: LoraConfig
    entries: dict[int, ModuleEntry]
    extra: ExtraPlan
    size: int
    tensors: Mapping[str, TensorInfo]

    @property
    def rank(self) -> int:
        """The largest one; 0 without A and B of linear layers."""
        return max((entry.rank for entry in self.entries.values()), default=0)

    @property
    def why_alone(self) -> str | None:
        """Why the adapter cannot be one of several: only what A and B of linear layers add can be summed."""
        if self.config.use_dora:
            return "is a DoRA, whose change is not a sum of B·A, so it cannot be part of a composition"
        if self.extra.extras:
            module = self.extra.extras[0].module
            return f"changes {module} otherwise than by adding B·A, so it cannot be part of a composition"
        return None

    def card(self, element_bytes: int) -> AdapterCard:
        entries = self.entries.values()
        modules = {entry.module.name for entry in entries} | {extra.module for extra in self.extra.extras}
        variant: Variant = "dora" if self.config.use_dora else "rslora" if self.config.use_rslora else "lora"
        return AdapterCard(
            adapter_id=self.adapter.id,
            rank=self.rank or self.config.rank,
            variant=variant,
            target_modules=tuple(sorted({name.rpartition(".")[2] for name in modules})),
            num_modules=len(modules),
            num_parameters=sum(_num_parameters(entry) for entry in entries) + self.extra.num_parameters,
            num_bytes=self.size * element_bytes,
        )


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter ready for the device: `flat` has `plan.size` elements of the engine's dtype, in host memory."""

    plan: AdapterPlan
    flat: Tensor


@dataclass(frozen=True, slots=True)
class Base:
    """What an adapter is checked against and computed with.

    `modules` are the linear layers that A and B may stand beside, `unfit` says why another one is none of them.
    `weight(index)` is a linear layer's, dequantised, Shape [out, in]. `parameters` are those of all modules that each
    token passes once, `parameter(name)` gives one. `tied_head` is the head where it shares the input embedding's
    weight. `transposed` are the expert weights that lie as [experts, in, out]. With `pins_memory` what is read lies
    where a device can fetch it by itself.
    """

    modules: dict[str, BaseModule]
    weight: Callable[[int], Tensor]
    dtype: torch.dtype
    max_rank: int
    unfit: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, Shape] = field(default_factory=dict)
    parameter: Callable[[str], Tensor] = lambda name: torch.empty(0)
    embeddings: Mapping[str, Shape] = field(default_factory=dict)
    input_embedding: str = ""
    tied_head: str | None = None
    transposed: frozenset[str] = frozenset()
    pins_memory: bool = False


def plan_adapter(adapter: Adapter, base: Base) -> AdapterPlan:
    """Check config and tensor headers against the base; no weights are read. Raises AdapterError."""
    directory = Path(adapter.path)
    config = read_config(directory)
    tensors = _tensors(_weights(adapter))
    parts, others = _group_by_module({key: tensor.shape for key, tensor in tensors.items()}, config, base)
    _check_names(config, parts, base)
    entries, size = {}, 0
    for name, module in base.modules.items():
        if name in parts:
            entry, size = _plan_module(config, module, parts[name], size, base)
            if entry.rank:  # AdaLoRA may leave nothing of a module
                entries[module.index] = entry
        elif config.targets(name):
            raise AdapterInvalid(f"target_modules names {name}, for which the file has no weights")
    unit = ALIGNMENT_BYTES // base.dtype.itemsize
    extra = ExtraPlanner(config, others, base, size, lambda numel: _aligned(numel, unit)).plan(frozenset(parts))
    if config.invocation and extra.extras:
        raise AdapterUnsupported(f"alora_invocation_tokens is not supported with changes to {extra.extras[0].module}")
    if not entries and not extra.extras:
        raise AdapterInvalid("adapter_model.safetensors holds no LoRA weights")
    return AdapterPlan(adapter=adapter, config=config, entries=entries, extra=extra, size=extra.size, tensors=tensors)


def load_adapter(adapter: Adapter, base: Base) -> LoadedAdapter:
    """Plan and read in one go. Raises AdapterError; non-finite weights are refused."""
    return pieces.exhaust(read_adapter(plan_adapter(adapter, base), base))


def read_adapter(plan: AdapterPlan, base: Base) -> Pieces[LoadedAdapter]:
    """Read the weights into the arena's layout, piece by piece. Raises AdapterError; non-finite weights are refused."""
    flat = torch.zeros(plan.size, dtype=base.dtype, pin_memory=base.pins_memory)
    file = _WeightsFile(plan)
    halves = [(entry, *file.halves(entry.module.name)) for entry in plan.entries.values()]
    yield from pieces.copy_each(
        pair
        for entry, a, b in halves
        for pair in ((entry.a_of(flat), file.with_singular_values(entry.module.name, a)), (entry.b_of(flat), b.t()))
    )
    for entry, a, b in halves:
        if (gain := entry.gain_of(flat)) is not None:
            magnitude = file.part(entry.module.name, "lora_magnitude_vector").float().flatten()
            yield from _read_gain(gain, base.weight(entry.module.index), a, b, entry.scale, magnitude)
    yield from read_extras(plan.extra, flat, file.find, base.parameter)
    if not (yield from pieces.are_finite(flat)):
        raise AdapterInvalid(f"the weights are not all finite in {base.dtype}")
    return LoadedAdapter(plan=plan, flat=flat)


def _read_gain(gain: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Pieces[None]:
    """gain = m / ‖W + scale·B·A‖ per output feature (DoRA, arXiv 2402.09353, eq. 5), in float32. Shape [out].

    W may lie on a device, all else is in host memory: a batch of rows is fetched at a time, as each waits for the step.
    """
    for batch in pieces.slices(weight, pieces.BATCH):
        here = weight[batch].cpu()
        for rows in pieces.slices(here):
            norm = torch.linalg.norm(here[rows].float() + scale * (b[batch][rows].float() @ a.float()), dim=1)
            gain[batch][rows].copy_(magnitude[batch][rows] / norm)
            yield


def _weights(adapter: Adapter) -> Path:
    return Path(adapter.path) / "adapter_model.safetensors"


def _tensors(path: Path) -> dict[str, TensorInfo]:
    """By PEFT's names, whatever the file calls them."""
    try:
        tensors = read_header(path)
    except (AdapterInvalid, OSError) as error:
        raise AdapterInvalid(f"adapter_model.safetensors cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise AdapterUnsupported(f"tensor {name} is {tensor.dtype}; there are {sorted(DTYPES)}")
    return {name: tensors[key] for name, key in names_of_peft(tensors).items()}


class _WeightsFile:
    """The tensors of a planned adapter's file, as views of it."""

    def __init__(self, plan: AdapterPlan) -> None:
        path = _weights(plan.adapter)
        self._tensors = plan.tensors
        self._is_adalora = plan.config.is_adalora
        try:
            self._bytes = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise AdapterInvalid(f"adapter_model.safetensors cannot be read: {error}") from error

    def tensor(self, name: str) -> Tensor:
        info = self._tensors[name]
        own, dtype = self._bytes[info.begin : info.end], DTYPES[info.dtype]
        aligned = own if info.begin % dtype.itemsize == 0 else own.clone()
        return aligned.view(dtype).view(info.shape)

    def find(self, name: str) -> Tensor:
        """By its name without PEFT's prefix, and with or without `.weight` at its end."""
        name = PREFIX + name
        return self.tensor(name if name in self._tensors else f"{name}.weight")

    def part(self, module: str, part: str) -> Tensor:
        """Of a module's LoRA: its `lora_A`, `lora_B`, `lora_E` or `lora_magnitude_vector`."""
        return self.find(f"{module}.{part}")

    def halves(self, module: str) -> tuple[Tensor, Tensor]:
        return self.part(module, "lora_A"), self.part(module, "lora_B")

    def with_singular_values(self, module: str, a: Tensor) -> Tensor:
        """AdaLoRA's E·A, for B·(E·A) is a LoRA as any other (arXiv 2303.10512, eq. 3); A without an E."""
        return a.float() * self.part(module, "lora_E").float() if self._is_adalora else a


def _group_by_module(
    shapes: dict[str, Shape], config: LoraConfig, base: Base
) -> tuple[dict[str, dict[str, Shape]], dict[str, Shape]]:
    """The parts of LoRAs on linear layers by module, and all other tensors, their names without PEFT's prefix.

    Raises AdapterInvalid where two tensors are one part, AdapterUnsupported where one is of no LoRA.
    """
    wrapped = {name.rpartition(".")[0] for name in base.parameters if config.targets_parameter(name)}
    unused = {module for module, why in base.unfit.items() if why == UNUSED}
    parts: dict[str, dict[str, Shape]] = {}
    others: dict[str, Shape] = {}
    names: dict[tuple[str, str], str] = {}
    for key, shape in shapes.items():
        match = lora_part(key)
        if unused and not unused.isdisjoint(_modules_of(key)):
            continue  # a layer that no token passes: whatever stands beside it or in it, it changes nothing
        if match is not None and match[0].replace(".base_layer", "") not in wrapped:
            claim(names, match, key)
            parts.setdefault(match[0], {})[match[1]] = shape
        elif key.startswith(PREFIX):
            others[key.removeprefix(PREFIX)] = shape
        else:
            raise AdapterUnsupported(f"tensor {key} is not part of a LoRA")
    return parts, others


def _modules_of(key: str) -> list[str]:
    """Every module's name that the tensor's name begins with."""
    parts = key.removeprefix(PREFIX).replace(".base_layer", "").split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _check_names(config: LoraConfig, parts: Iterable[str], base: Base) -> None:
    """Every module the file has weights for exists and is a target."""
    for name in parts:
        if name in base.unfit:
            raise AdapterUnsupported(f"{name} cannot carry a LoRA: in this model it {base.unfit[name]}")
        if name not in base.modules and _ONE_EXPERT.fullmatch(name) and _has_stacks(base):
            raise AdapterUnsupported(
                f"{name} is a layer of one expert, and in this base the weights of all experts are stacked: an adapter "
                "changes them by target_parameters; the form of one LoRA for each expert is not supported"
            )
        if name not in base.modules:
            raise AdapterMismatch(f"the base model has no linear layer {name}")
        if name == base.tied_head and config.tied == "saved":
            raise AdapterUnsupported(f"LoRA on {name}, which ensure_weight_tying has replaced, is not supported")
        is_tied = name == base.tied_head and config.tied == "lora"  # PEFT took it out of the targets
        if not config.targets(base.input_embedding if is_tied else name):
            raise AdapterInvalid(f"the file has weights for {name}, which target_modules does not name")


def _has_stacks(base: Base) -> bool:
    return any(len(shape) == 3 and "experts" in name.split(".") for name, shape in base.parameters.items())


def _plan_module(
    config: LoraConfig, module: BaseModule, shapes: dict[str, tuple[int, ...]], offset: int, base: Base
) -> tuple[ModuleEntry, int]:
    """(entry, offset behind it). Raises AdapterError where shapes do not fit the config or the base."""
    rank = config.rank_of(module.name)
    if rank > base.max_rank:
        raise AdapterTooLarge(f"rank {rank} of {module.name} exceeds adapters.max_rank = {base.max_rank}")
    expected: dict[str, tuple[int, ...]] = {"lora_A": (rank, module.in_features), "lora_B": (module.out_features, rank)}
    if config.use_dora:
        expected["lora_magnitude_vector"] = (module.out_features,)
    if config.is_adalora:
        expected["lora_E"] = (rank, 1)
    if surplus := sorted(shapes.keys() - expected.keys()):
        why = "peft_type is not ADALORA" if surplus[0] == "lora_E" else "use_dora is not set"
        raise AdapterInvalid(f"{module.name} has {surplus[0]}, but {why}")
    for part, shape in expected.items():
        if part not in shapes:
            raise AdapterInvalid(f"{module.name} lacks {part}")
        found = shapes[part]
        if found != shape and not (part == "lora_magnitude_vector" and _without_ones(found) == _without_ones(shape)):
            raise AdapterMismatch(f"{part} of {module.name} has shape {list(found)}; the base needs {list(shape)}")
    unit = ALIGNMENT_BYTES // base.dtype.itemsize
    a = offset
    b = a + _aligned(rank * module.in_features, unit)
    end = b + _aligned(rank * module.out_features, unit)
    gain = end if config.use_dora else None
    end += _aligned(module.out_features, unit) if config.use_dora else 0
    return ModuleEntry(module=module, rank=rank, scale=config.scale_of(module.name), a=a, b=b, gain=gain), end


def _without_ones(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)


def _aligned(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _num_parameters(entry: ModuleEntry) -> int:
    module = entry.module
    gains = module.out_features if entry.gain is not None else 0
    return entry.rank * (module.in_features + module.out_features) + gains
