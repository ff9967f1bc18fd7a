"""One small random base with adapters of every kind, made once a run."""

from __future__ import annotations

import pytest
import torch
from support.models import SPECS, Oracle, llama_config, make_adapter, make_model
from support.worlds import SmallWorld


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two threads on a shared core can be twenty times slower than one on matrices this small."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    directory = tmp_path_factory.mktemp("small")
    base = directory / "base"
    make_model(llama_config(), base)
    adapters = {spec.name: make_adapter(base, spec, directory / "adapters") for spec in SPECS}
    return SmallWorld(base, adapters, Oracle(base))
