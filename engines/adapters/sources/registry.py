"""Which source an address belongs to."""

from __future__ import annotations

import re

from loraplex.config.settings import Adapters
from loraplex.engines.adapters.disk import DiskCache
from loraplex.engines.adapters.sources.base import Address, Source
from loraplex.engines.adapters.sources.https import HttpsSource
from loraplex.engines.adapters.sources.hub import HubSource
from loraplex.engines.adapters.sources.local import LocalSource
from loraplex.engines.adapters.sources.s3 import S3Source
from loraplex.engines.adapters.sources.upload import UploadSource
from loraplex.engines.errors import AdapterInvalid, AdapterSourceForbidden

MAX_URI_CHARACTERS = 4096
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


class Sources:
    """One source of each kind, by the scheme of its addresses; no scheme is a local path."""

    def __init__(self, settings: Adapters, uploads: DiskCache) -> None:
        local = LocalSource(settings.local_roots)
        self._by_scheme: dict[str, Source] = {
            "": local,
            "file": local,
            "hf": HubSource(settings.hub_endpoint),
            "s3": S3Source(settings.s3_endpoint, settings.s3_buckets),
            "upload": UploadSource(uploads),
            "https": HttpsSource(settings.https_ca_file, allow_private=settings.https_allow_private),
        }

    def find(self, uri: str) -> tuple[Source, Address]:
        """The source of an address, and the address in normal form. Raises AdapterInvalid, AdapterSourceForbidden."""
        if not uri or len(uri) > MAX_URI_CHARACTERS:
            raise AdapterInvalid(f"an adapter's address has 1 to {MAX_URI_CHARACTERS} characters, not {len(uri)}")
        if not uri.isprintable():
            raise AdapterInvalid("an adapter's address holds no control characters or broken Unicode")
        match = _SCHEME.match(uri)
        scheme = match[1].lower() if match else ""
        source = self._by_scheme.get(scheme)
        if source is None:
            raise AdapterSourceForbidden(f"{scheme}: is not served; there are hf://, s3://, https:// and local paths")
        return source, source.parse(uri[: len(scheme)].lower() + uri[len(scheme) :])
