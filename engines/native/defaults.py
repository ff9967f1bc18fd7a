"""A checkpoint's generation_config.json -> how requests that leave it open are sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from loraplex.engines.errors import ModelNotServable
from loraplex.engines.protocol import SamplingDefaults


def sampling_defaults(directory: Path) -> SamplingDefaults:
    """Raises ModelNotServable where a value cannot be a default. `do_sample` is a request's own: its temperature 0."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return SamplingDefaults()
    try:
        said: dict[str, Any] = json.loads(path.read_text())
        known = {name: said[name] for name in SamplingDefaults.__struct_fields__ if said.get(name) is not None}
        defaults = msgspec.convert(known, SamplingDefaults)
    except (ValueError, AttributeError) as error:
        raise ModelNotServable(f"{path}: {error}; model.generation_config = 'none' leaves it aside") from error
    allowed = {
        "temperature": defaults.temperature >= 0,
        "top_p": 0 < defaults.top_p <= 1,
        "top_k": defaults.top_k >= 0,
        "min_p": 0 <= defaults.min_p <= 1,
        "typical_p": 0 < defaults.typical_p <= 1,
        "repetition_penalty": defaults.repetition_penalty > 0,
    }
    if wrong := [name for name, is_allowed in allowed.items() if not is_allowed]:
        raise ModelNotServable(
            f"{path}: {wrong[0]} = {said[wrong[0]]} is not valid; model.generation_config = 'none' leaves it aside"
        )
    return defaults
