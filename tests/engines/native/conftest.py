"""One small random base with adapters of every kind, made once a run."""

from __future__ import annotations

import pytest
import torch
from support.worlds import SmallWorld, make_small_world


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two threads on a shared core can be twenty times slower than one on matrices this small."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_small_world(tmp_path_factory.mktemp("small"))
