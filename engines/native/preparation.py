"""What threads do for an adapter: check, plan and read it, so that no step waits for a disk, a hostile pattern or a
large file. Most of that is done in few long calls, in which the interpreter's lock is free for the steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import torch

from loraplex.engines.adapters.peft import Base, LoadedAdapter, plan_adapter, read_adapter
from loraplex.engines.errors import AdapterError, AdapterInvalid
from loraplex.engines.native.model import use_device
from loraplex.engines.protocol import Adapter

_CHUNK = 2**20


def adapter_threads(num_threads: int, device: torch.device) -> ThreadPoolExecutor:
    """For adapters of a base on that device."""
    return ThreadPoolExecutor(num_threads, "adapter", initializer=_begin, initargs=(device,))


def _begin(device: torch.device) -> None:
    """Each computes alone: a team of torch's threads beside that of the steps would make both wait."""
    torch.set_num_threads(1)
    use_device(device)


class Preparation:
    """One adapter's, under way in a thread from the start; `began` is when that was, by the caller's clock.

    `make_room(size)` is called there, with the elements that it will take on the device.
    """

    def __init__(
        self,
        adapter: Adapter,
        base: Base,
        threads: ThreadPoolExecutor,
        began: float,
        make_room: Callable[[int], None],
    ) -> None:
        self.began = began
        self._make_room = make_room
        self._is_given_up = Event()
        self._future = threads.submit(self._prepare, adapter, base)

    @property
    def is_done(self) -> bool:
        return self._future.done()

    def loaded(self) -> LoadedAdapter:
        """Once done. Raises AdapterError."""
        try:
            found = self._future.result()
        except AdapterError:
            raise
        except Exception as error:  # whatever files can break, it is their own request's error
            raise AdapterInvalid(f"cannot be loaded: {error!r}") from error
        assert found is not None, "nobody takes what was given up"
        return found

    def give_up(self) -> None:
        """Nobody wants it any more; a thread that has begun stops soon."""
        self._is_given_up.set()
        self._future.cancel()

    def _prepare(self, adapter: Adapter, base: Base) -> LoadedAdapter | None:
        """None where it was given up."""
        plan = plan_adapter(adapter, base)
        chunk = bytearray(_CHUNK)
        with (Path(adapter.path) / "adapter_model.safetensors").open("rb", buffering=0) as file:
            while not self._is_given_up.is_set() and file.readinto(chunk):
                pass
        self._make_room(plan.size)
        reading = read_adapter(plan, base)
        while not self._is_given_up.is_set():
            try:
                next(reading)
            except StopIteration as stop:
                loaded: LoadedAdapter = stop.value
                return loaded
        return None
