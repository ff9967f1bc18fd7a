"""Work in a thread that a test holds up."""

from __future__ import annotations

import threading


class Work:
    """Lasts until it is let go."""

    def __init__(self) -> None:
        self.goes, self.began = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.began.set()
        assert self.goes.wait(20)
        return "done"
