"""The longest prompt and answer: what the settings say, within what the checkpoint was made for."""

import json
from pathlib import Path

from loraplex.engines.errors import ModelNotServable


def context_length(wanted: int | None, num_positions: int | None) -> int:
    """Of model.max_model_len and the checkpoint's max_position_embeddings. Raises ModelNotServable."""
    if num_positions is None and wanted is None:
        raise ModelNotServable("the checkpoint names no max_position_embeddings; set model.max_model_len")
    if num_positions is not None and wanted is not None and wanted > num_positions:
        raise ModelNotServable(f"model.max_model_len = {wanted} exceeds the checkpoint's {num_positions} positions")
    return wanted if wanted is not None else int(num_positions or 0)


def stated_positions(directory: Path) -> int | None:
    """What config.json says itself; where it does not, the kind of model may. Raises ModelNotServable."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelNotServable(f"{path} cannot be read: {error}") from error
    text = config.get("text_config", config) if isinstance(config, dict) else None
    if not isinstance(text, dict):
        raise ModelNotServable(f"{path} describes no model")
    stated = text.get("max_position_embeddings")
    return stated if isinstance(stated, int) else None
