"""A base with its adapters and the oracle for both, as tests pass it around."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.models import SPECS, Oracle, llama_config, make_adapter, make_model

from loraplex.config.settings import Adapters, EngineSettings, Model, Settings
from loraplex.engines.protocol import Adapter


@dataclass(frozen=True)
class SmallWorld:
    """A base model's directory, its adapters by name, and the oracle for both."""

    directory: Path
    adapters: dict[str, Adapter]
    oracle: Oracle

    def settings(self, **engine: Any) -> Settings:
        options: dict[str, Any] = {"kv_block_size": 4, "max_batch_tokens": 48, "num_threads": 1, **engine}
        return Settings(
            model=Model(path=str(self.directory), name="small", dtype="float32", device="cpu"),
            engine=EngineSettings(**options),
            adapters=Adapters(device_bytes=8 * 2**20),
        )


def make_small_world(directory: Path, **changes: Any) -> SmallWorld:
    """A small random Llama with adapters of every kind; `changes` are to its config."""
    base = directory / "base"
    make_model(llama_config(**changes), base)
    adapters = {spec.name: make_adapter(base, spec, directory / "adapters") for spec in SPECS}
    return SmallWorld(base, adapters, Oracle(base))
