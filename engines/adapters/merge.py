"""Several LoRAs -> one, in a process of its own: `python -m loraplex.engines.adapters.merge DIRECTORY < recipe.json`.

The strategies are those of PEFT's `add_weighted_adapter` on full products: TIES (arXiv 2306.01708) and DARE
(arXiv 2311.03099) prune, elect signs and add up scale·B·A of each module, so ranks may differ and no scale is lost.
What comes out is no product of small matrices any more; its singular value decomposition is, to any accuracy wanted.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraplex.engines.adapters.config import LoraConfig, read_config
from loraplex.engines.adapters.peft import DTYPES
from loraplex.engines.adapters.recipe import MergeRecipe, SignMethod
from loraplex.engines.adapters.tensor_names import PREFIX, claim, lora_part, names_of_peft
from loraplex.engines.errors import (
    AdapterInvalid,
    AdapterMismatch,
    AdapterTooLarge,
    AdapterUnsupported,
    EngineError,
    to_wire,
)

_HALVES = {"lora_A", "lora_B"}
# Singular values are left out while all that is left out is at most this share of the merged weights' norm.
TOLERANCE = 1e-4
# A whole decomposition takes cubic time; beyond this many rows and columns the leading part is computed alone.
_WHOLE = 1024
_OVERSAMPLING = 16


@dataclass(frozen=True, slots=True)
class _Factors:
    """One module of one adapter: scale·B·A. a: Shape [rank, in]; b: Shape [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float

    def product(self) -> Tensor:
        return self.scale * (self.b.float() @ self.a.float())


def merge(recipe: MergeRecipe, directory: Path) -> None:
    """Write the merged adapter as PEFT would.

    Raises AdapterUnsupported, AdapterMismatch, AdapterInvalid, AdapterTooLarge.
    """
    adapters = [_read(Path(part.path), part.adapter_id) for part in recipe.parts]
    generator = torch.Generator().manual_seed(recipe.seed)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module in sorted(set().union(*adapters)):
        _require_memory(module, [adapter[module] for adapter in adapters if module in adapter])
        found = [(adapter[module].product(), part.weight)
                 for adapter, part in zip(adapters, recipe.parts, strict=True) if module in adapter]  # fmt: skip
        if len({delta.shape for delta, _ in found}) > 1:
            raise AdapterMismatch(f"the adapters have other shapes for {module}: they are of different bases")
        merged = merged_deltas([delta for delta, _ in found], [weight for _, weight in found], recipe, generator)
        a, b = factors_of(merged, recipe.max_rank)
        ranks[module] = a.shape[0]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.contiguous()
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise AdapterInvalid("what comes out of the merge is not finite")
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(_config(ranks), indent=1))


def _require_memory(module: str, parts: Sequence[_Factors]) -> None:
    """Raises AdapterTooLarge where the products of a module would take more than half of the machine's memory.

    Two of each part are there at a time, and some six of what becomes of them: a few kilobytes can ask for terabytes.
    """
    largest = max(part.b.shape[0] * part.a.shape[1] for part in parts)
    needed = (2 * len(parts) + 6) * largest * torch.float32.itemsize
    if needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2:
        raise AdapterTooLarge(f"merging {module} would take {needed / 2**30:.0f} GiB of memory")


def merged_deltas(
    deltas: Sequence[Tensor], weights: Sequence[float], recipe: MergeRecipe, generator: torch.Generator
) -> Tensor:
    """One module's merged weights; each of `deltas` is scale·B·A, Shape [out, in]."""
    if recipe.strategy == "ties":
        pruned = [_largest(delta, recipe.density) for delta in deltas]
    else:
        pruned = [_random(delta, recipe.density, generator) for delta in deltas]
    stacked = torch.stack(pruned)
    weighted = stacked * torch.tensor(weights, dtype=stacked.dtype).view(-1, 1, 1)
    if recipe.strategy == "dare_linear":
        return weighted.sum(0)
    agrees = _elected(stacked, recipe.sign_method)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def factors_of(delta: Tensor, max_rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) with B·A = delta up to TOLERANCE, or as near as `max_rank` allows; Shapes [rank, in], [out, rank]."""
    limit = min(max_rank, *delta.shape)
    if min(delta.shape) <= _WHOLE:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(delta, q=min(limit + _OVERSAMPLING, *delta.shape), niter=4)
        vh = v.t()
    total = float(delta.double().square().sum())
    left_out = total - s.double().square().cumsum(0)
    enough = (left_out <= TOLERANCE**2 * total).nonzero()
    rank = min(limit, int(enough[0]) + 1 if len(enough) else limit)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _largest(delta: Tensor, density: float) -> Tensor:
    """The share `density` of the weights, those furthest from zero."""
    if density >= 1:
        return delta
    kept = torch.zeros_like(delta).flatten()
    kept[delta.abs().flatten().topk(int(density * delta.numel())).indices] = 1
    return delta * kept.view_as(delta)


def _random(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each weight with the probability `density`, scaled so that the expected value stays."""
    if density >= 1:
        return delta
    return delta * torch.bernoulli(torch.full_like(delta, density), generator=generator) / density


def _elected(stacked: Tensor, method: SignMethod) -> Tensor:
    """Where each adapter's weight has the sign that all together have; nought counts as plus for all together."""
    votes = stacked.sum(0) if method == "total" else stacked.sign().sum(0)
    return stacked.sign() == torch.where(votes >= 0, 1.0, -1.0)


def _read(directory: Path, adapter_id: str) -> dict[str, _Factors]:
    """The modules of one adapter, as far as they can be judged without its base.

    Raises AdapterUnsupported for one that is more than A and B of linear layers, AdapterInvalid where the file is not
    what the config says.
    """
    config = read_config(directory)
    shown = adapter_id[:12]
    if reason := _unmergeable(config):
        raise AdapterUnsupported(f"{shown} {reason}, so it cannot be merged")
    halves: dict[str, dict[str, Tensor]] = {}
    names: dict[tuple[str, str], str] = {}
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        for name, key in names_of_peft(file.keys()).items():
            part = lora_part(name)
            if part is None or part[1] not in _HALVES:
                raise AdapterUnsupported(f"{shown} has {key}, no A or B of a linear layer, so it cannot be merged")
            claim(names, part, key)
            halves.setdefault(part[0], {})[part[1]] = file.get_tensor(key)
    if not halves:
        raise AdapterInvalid(f"{shown} holds no LoRA weights")
    return {module: _factors(config, module, parts, shown) for module, parts in halves.items()}


def _unmergeable(config: LoraConfig) -> str | None:
    """What it does beside adding B·A to linear layers, by the field that says so."""
    if config.is_adalora:
        return "is an AdaLoRA, which PEFT does not merge"
    if config.use_dora:
        return "is a DoRA, whose change is not a sum of B·A"
    if config.invocation:
        return "is active from its invocation on only"
    for field, names in (
        ("modules_to_save", config.modules_to_save),
        ("trainable_token_indices", config.token_ids),
        ("target_parameters", config.target_parameters),
    ):
        if names:
            return f"has {field}, which is more than A and B of linear layers"
    return None


def _factors(config: LoraConfig, module: str, parts: dict[str, Tensor], shown: str) -> _Factors:
    """Raises AdapterInvalid where the config says otherwise, AdapterUnsupported for numbers of another kind."""
    if missing := _HALVES - parts.keys():
        raise AdapterInvalid(f"{shown} lacks {min(missing)} of {module}")
    if not config.targets(module):
        raise AdapterInvalid(f"{shown} has weights for {module}, which target_modules does not name")
    a, b, rank = parts["lora_A"], parts["lora_B"], config.rank_of(module)
    for part, tensor in (("lora_A", a), ("lora_B", b)):
        if tensor.dtype not in DTYPES.values():
            raise AdapterUnsupported(f"{part} of {module} in {shown} is {tensor.dtype}; there are {sorted(DTYPES)}")
        if tensor.dim() != 2 or tensor.shape[0 if part == "lora_A" else 1] != rank:
            raise AdapterInvalid(
                f"{part} of {module} in {shown} has shape {list(tensor.shape)}; its config says rank {rank}"
            )
    return _Factors(a, b, config.scale_of(module))


def _config(ranks: dict[str, int]) -> dict[str, object]:
    """The scale is in the matrices already: alpha is the rank everywhere."""
    most = max(ranks.values())
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "bias": "none",
        "inference_mode": True,
    }


def main() -> None:
    """Merge what standard input says; an error is told on standard output, as `errors.to_wire` gives it."""
    os.nice(10)  # streams go first
    with suppress(OSError):  # where memory runs out, this is what may go
        Path("/proc/self/oom_score_adj").write_text("1000")
    recipe = msgspec.json.decode(sys.stdin.buffer.read(), type=MergeRecipe)
    try:
        merge(recipe, Path(sys.argv[1]))
    except EngineError as error:
        sys.stdout.write(json.dumps(to_wire(error)))
        sys.exit(1)


if __name__ == "__main__":
    main()
