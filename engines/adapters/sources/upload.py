"""Adapters that were sent to this server: kept for good, by the hash of their content, until nothing names them."""

from __future__ import annotations

import re
import shutil

from loraplex.engines.adapters.disk import DiskCache
from loraplex.engines.adapters.manifest import MANIFEST
from loraplex.engines.adapters.sources.base import Address, Listing, RemoteFile, Transfer, Workspace
from loraplex.engines.adapters.sources.selection import select
from loraplex.engines.errors import AdapterInvalid, AdapterNotFound

_URI = re.compile(r"upload://(?P<id>[0-9a-f]{64})")


class UploadSource:
    """`upload://HASH`. Copied into the cache like any other source's, so that the cache may forget it."""

    def __init__(self, kept: DiskCache) -> None:
        self._kept = kept

    def parse(self, uri: str) -> Address:
        if _URI.fullmatch(uri) is None:
            raise AdapterInvalid("this is no upload; uploads are upload:// and 64 hexadecimal digits")
        return Address(uri=uri, shown=uri)

    def at(self, address: Address, revision: str) -> Address:
        return address

    def list(self, address: Address, token: str | None, transfer: Transfer) -> Listing:
        object_id = upload_id(address.uri)
        if self._kept.find(object_id) is None:
            raise AdapterNotFound("this upload is not here, or no longer whole; send the files again")
        with self._kept.hold(object_id) as place:
            names = select(path.name for path in place.iterdir() if path.name != MANIFEST)
            files = tuple(RemoteFile(name, (place / name).stat().st_size) for name in names)
        return Listing(revision=object_id, files=files)

    def download(
        self, address: Address, listing: Listing, token: str | None, workspace: Workspace, transfer: Transfer
    ) -> None:
        with self._kept.hold(upload_id(address.uri)) as place:
            for file in listing.files:
                transfer.check()
                shutil.copyfile(place / file.name, workspace.files / file.name)


def upload_id(uri: str) -> str:
    """The content hash that an upload's address names, "" for any other address."""
    match = _URI.fullmatch(uri)
    return match["id"] if match else ""
