"""One small random base with adapters of every kind, made once a run."""

from __future__ import annotations

import pytest
from support.worlds import SmallWorld, make_small_world


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_small_world(tmp_path_factory.mktemp("small"))
