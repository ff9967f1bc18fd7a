"""How much memory there is, and whether what is to be loaded fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from loraplex.engines.errors import ModelNotServable

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_GIB = 2**30
# What `quant_method` calls the forms whose weights transformers unpacks as it reads them: everywhere, and on a CPU.
_UNPACKED = {"compressed-tensors"}
_UNPACKED_ON_CPU = {*_UNPACKED, "fp8", "mxfp4"}


def free_bytes(device: torch.device, cgroup: Path = _CGROUP, meminfo: Path = _MEMINFO) -> int:
    """What can be allocated on the device: on a CPU what the machine, or its container, has available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int((cgroup / limit).read_text()) - int((cgroup / used).read_text()) + _file_cache(cgroup))
        except (OSError, ValueError):  # no such cgroup, or "max": no limit
            continue
    return max(free, 0)


def require_room_for_weights(directory: Path, dtype: torch.dtype | None, device: torch.device) -> None:
    """Raises ModelNotServable where the checkpoint, in `dtype` or the type it is stored in, exceeds what is free."""
    free = free_bytes(device)
    needed = max(weight_bytes(directory, dtype), unpacked_bytes(directory, dtype, device))
    if needed > free:
        raise ModelNotServable(
            f"the weights in {directory} take {needed / _GIB:.1f} GiB in memory, and {free / _GIB:.1f} GiB are free on "
            f"{device}; use a smaller or quantised checkpoint, or a smaller model.dtype"
        )


def weight_bytes(directory: Path, dtype: torch.dtype | None) -> int:
    """Size in memory of a checkpoint's safetensors files; `dtype` replaces their floating types. 0 without any.

    Raises ModelNotServable for a file that is cut off, or no safetensors file.
    """
    total = 0
    for path in sorted(directory.glob("*.safetensors")):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                part = file.get_slice(name)
                stored = _itemsize(part.get_dtype())
                is_wide_float = part.get_dtype() in ("F64", "F32", "F16", "BF16")
                itemsize = dtype.itemsize if dtype is not None and is_wide_float else stored
                total += int(torch.Size(part.get_shape()).numel() * itemsize)
    return total


def _opened(path: Path) -> Any:
    """As a context that gives the file. Raises ModelNotServable."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelNotServable(f"{path} cannot be read: {error}") from error


def unpacked_bytes(directory: Path, dtype: torch.dtype | None, device: torch.device) -> int:
    """Size in memory of a quantised checkpoint that is unpacked as it is read. 0 of any other, or if that fails."""
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        quantised = getattr(config, "quantization_config", None)
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        if method not in (_UNPACKED_ON_CPU if device.type == "cpu" else _UNPACKED):
            return 0
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError, ImportError, RuntimeError):  # its reader says why
        return 0
    return sum(parameter.nbytes for parameter in model.parameters())


def _itemsize(name: str) -> float:
    """Bytes of one element of a safetensors type, whose name ends in its bits: F32, BF16, U8, F8_E4M3."""
    digits = "".join(symbol for symbol in name.split("_")[0] if symbol.isdigit())
    return int(digits) / 8 if digits else 1


def _file_cache(cgroup: Path) -> int:
    """Pages of files count as used in a cgroup, and give way."""
    for path in (cgroup / "memory.stat", cgroup / "memory/memory.stat"):
        try:
            figures = dict(line.split() for line in path.read_text().splitlines())
            return int(figures.get("inactive_file", 0))
        except (OSError, ValueError):
            continue
    return 0
