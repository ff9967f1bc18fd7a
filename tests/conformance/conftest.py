"""What the comparisons with transformers and PEFT share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def quiet() -> Iterator[None]:
    """One thread, and no warnings about models this small."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
