"""Keeps the files of a request's adapters on this machine's disk until the request is over."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
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


@contextmanager
def holding(store: DiskTier, parts: Iterable[WeightedAdapter]) -> Iterator[None]:
    """Until the block ends. Raises AdapterSourceUnavailable where the disk cache gave an adapter up a moment ago."""
    with ExitStack() as holds:
        for part in parts:
            try:
                holds.enter_context(store.hold(part.adapter))
            except AdapterNotFound as error:
                name = part.adapter.name
                raise AdapterSourceUnavailable(f"{name} has just left the disk cache; try again") from error
        yield
