"""Keeps the files of a request's adapters on this machine's disk until the request is over."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from loraplex.engines.errors import AdapterNotFound, AdapterSourceUnavailable
from loraplex.engines.protocol import Adapter, WeightedAdapter
from loraplex.engines.stats import AdapterTierStats, TierStats


class DiskTier(Protocol):
    """The adapters' files on this machine."""

    def hold(self, adapter: Adapter) -> AbstractContextManager[Path]:
        """Keep an adapter's files from eviction while a request uses it. Raises AdapterNotFound."""
        ...

    async def stats(self) -> tuple[TierStats, Sequence[AdapterTierStats]]:
        """The figures of the tier, in all and by adapter."""
        ...


def holding(store: DiskTier, parts: Sequence[WeightedAdapter]) -> AbstractContextManager[None]:
    """Until the block ends. Raises AdapterSourceUnavailable where the disk cache gave an adapter up a moment ago."""
    return _holding(store, parts) if parts else nullcontext()


@contextmanager
def _holding(store: DiskTier, parts: Sequence[WeightedAdapter]) -> Iterator[None]:
    with ExitStack() as holds:
        for part in parts:
            try:
                holds.enter_context(store.hold(part.adapter))
            except AdapterNotFound as error:
                name = part.adapter.name
                raise AdapterSourceUnavailable(f"{name} has just left the disk cache; try again") from error
        yield
