"""What every adapter must be before it enters the cache; what it means for one base model is judged elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loraplex.engines.adapters.config import METHODS
from loraplex.engines.adapters.finite import check_finite
from loraplex.engines.adapters.safetensors_header import read_header
from loraplex.engines.adapters.sources.base import RemoteFile
from loraplex.engines.adapters.sources.selection import CONFIG, WEIGHTS, check_sizes, select
from loraplex.engines.errors import AdapterInvalid, AdapterUnsupported


def screen(directory: Path, max_bytes: int) -> None:
    """Look at downloaded files: the right ones, of bounded size, a LoRA's config, sound and finite safetensors.

    Raises AdapterInvalid, AdapterTooLarge, AdapterUnsupported.
    """
    names = select(os.listdir(directory))
    check_sizes([RemoteFile(name, (directory / name).stat().st_size) for name in names], max_bytes)
    check_config(directory / CONFIG)
    check_finite(directory / WEIGHTS, read_header(directory / WEIGHTS).values())


def check_config(path: Path) -> None:
    """Raises AdapterInvalid where this is not a JSON object, AdapterUnsupported naming another PEFT method."""
    try:
        config: Any = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{CONFIG} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(config, dict):
        raise AdapterInvalid(f"{CONFIG} is not a JSON object")
    if "peft_type" not in config:
        raise AdapterInvalid(f"{CONFIG} has no peft_type")
    if (kind := config["peft_type"]) not in METHODS:
        raise AdapterUnsupported(
            f"peft_type is {ascii(kind)[:80]}; only {' and '.join(METHODS)} adapters can be served"
        )
