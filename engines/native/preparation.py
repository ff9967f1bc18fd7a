"""What threads do for an adapter: check and plan it, and bring its file's pages to memory, so that no step waits for a
disk or for a hostile pattern."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from loraplex.engines.adapters.peft import AdapterPlan, Base, plan_adapter
from loraplex.engines.errors import AdapterError, AdapterInvalid
from loraplex.engines.protocol import Adapter

_CHUNK = 2**20


class Preparation:
    """One adapter's, under way in a thread from the start; `began` is when that was, by the caller's clock."""

    def __init__(self, adapter: Adapter, base: Base, threads: ThreadPoolExecutor, began: float) -> None:
        self.began = began
        self._is_given_up = Event()
        self._future = threads.submit(self._prepare, adapter, base)

    @property
    def is_done(self) -> bool:
        return self._future.done()

    def plan(self) -> AdapterPlan:
        """Once done. Raises AdapterError."""
        try:
            return self._future.result()
        except AdapterError:
            raise
        except Exception as error:  # whatever files can break, it is their own request's error
            raise AdapterInvalid(f"cannot be loaded: {error!r}") from error

    def give_up(self) -> None:
        """Nobody wants it any more; a thread that has begun stops soon."""
        self._is_given_up.set()
        self._future.cancel()

    def _prepare(self, adapter: Adapter, base: Base) -> AdapterPlan:
        plan = plan_adapter(adapter, base)
        chunk = bytearray(_CHUNK)
        with (Path(adapter.path) / "adapter_model.safetensors").open("rb", buffering=0) as file:
            while not self._is_given_up.is_set() and file.readinto(chunk):
                pass
        return plan
