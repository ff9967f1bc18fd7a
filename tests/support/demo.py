"""A running demo, as tests pass it around."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Demo:
    """What the demo printed, and its process."""

    base_url: str
    api_key: str
    admin_key: str
    models: list[str]
    process: subprocess.Popen[str]

    @property
    def root(self) -> str:
        return self.base_url.removesuffix("/v1")
