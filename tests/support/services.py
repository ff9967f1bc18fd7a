"""Real services on this machine: a test that needs one skips with the reason, or fails where CI demands it."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(service: str, reason: object) -> NoReturn:
    """Skip, or fail where LORAPLEX_REQUIRE_SERVICES is set."""
    message = f"{service} is not there: {reason}"
    if os.environ.get("LORAPLEX_REQUIRE_SERVICES"):
        pytest.fail(message)
    pytest.skip(message)
