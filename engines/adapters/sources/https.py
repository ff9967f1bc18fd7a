"""An adapter as one archive on a web server.

Redirects are followed by hand, so that every hop is held to the same rules as the first: https, a public address,
a valid certificate. The token goes to the first host only.
"""

from __future__ import annotations

import http.client
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from loraplex.config.settings import SettingsError
from loraplex.engines.adapters.sources.archive import unpack
from loraplex.engines.adapters.sources.base import CHUNK_BYTES, Address, Listing, Transfer, Workspace
from loraplex.engines.adapters.sources.network import JudgedConnection
from loraplex.engines.errors import (
    AdapterInvalid,
    AdapterNotFound,
    AdapterSourceForbidden,
    AdapterSourceUnavailable,
    AdapterTooLarge,
)

MAX_REDIRECTS = 5
_REDIRECTS = {301, 302, 303, 307, 308}


@dataclass(frozen=True, slots=True)
class _Hop:
    """One address on the way. `origin` is whom a token may be shown to."""

    origin: tuple[str, int]
    target: str
    url: str

    @staticmethod
    def of(url: str) -> _Hop:
        """Raises AdapterInvalid, AdapterSourceForbidden."""
        try:
            parts = urlsplit(url)
            port = parts.port or 443
        except ValueError as error:
            raise AdapterInvalid("this is not an https address") from error
        if parts.scheme != "https":
            raise AdapterSourceForbidden(f"{parts.scheme or 'an address without scheme'} is not https")
        if parts.username is not None or parts.password is not None:
            raise AdapterInvalid("an https address holds no user or password; give a token")
        if not parts.hostname or not url.isascii() or not url.isprintable() or " " in url:
            raise AdapterInvalid("this is not an https address; write https://host/path with anything else escaped")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return _Hop(origin=(parts.hostname, port), target=target, url=url)

    def then(self, location: str) -> _Hop:
        """Where a redirect leads. Raises AdapterInvalid, AdapterSourceForbidden."""
        try:
            url = urljoin(self.url, location)
        except ValueError as error:
            raise AdapterInvalid("a redirect leads to what is not an https address") from error
        return _Hop.of(url)


class HttpsSource:
    """`https://host/path/adapter.tar.gz` or `.zip`; the kind is told by its bytes. A token is sent as Bearer."""

    def __init__(self, ca_file: str | None, *, allow_private: bool) -> None:
        try:
            self._context = ssl.create_default_context(cafile=ca_file and os.path.expanduser(ca_file))
        except OSError as error:
            raise SettingsError(f"adapters.https_ca_file: {ca_file} holds no certificates: {error}") from error
        self._allow_private = allow_private

    def parse(self, uri: str) -> Address:
        hop = _Hop.of(uri.partition("#")[0])
        host, port = hop.origin
        place = f"[{host}]" if ":" in host else host
        shown = f"https://{place}{'' if port == 443 else f':{port}'}{hop.target.partition('?')[0]}"
        query = hop.target.partition("?")[2]
        return Address(uri=f"{shown}?{query}" if query else shown, shown=shown)

    def at(self, address: Address, revision: str) -> Address:
        return address

    def list(self, address: Address, token: str | None, transfer: Transfer) -> Listing:
        return Listing(revision=None, files=())  # only the archive knows

    def download(
        self, address: Address, listing: Listing, token: str | None, workspace: Workspace, transfer: Transfer
    ) -> None:
        archive = workspace.scratch / "archive"
        if not archive.exists():
            self._download_archive(address, token, workspace, transfer)
        unpack(archive, workspace, transfer)

    def _download_archive(self, address: Address, token: str | None, workspace: Workspace, transfer: Transfer) -> None:
        partial = _Partial(workspace.scratch)
        try:
            with self._answer(address.uri, token, partial.headers(), transfer) as answer:
                partial.append(answer, transfer)
        except (http.client.HTTPException, OSError) as error:
            raise AdapterSourceUnavailable(f"the transfer broke off ({type(error).__name__})") from None
        partial.finish(workspace.scratch / "archive")

    @contextmanager
    def _answer(
        self, url: str, token: str | None, headers: dict[str, str], transfer: Transfer
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer at the end of the redirects. Raises AdapterError."""
        hop = first = _Hop.of(url)
        for _ in range(MAX_REDIRECTS + 1):
            transfer.check()
            sent = {"Accept-Encoding": "identity", "User-Agent": "loraplex", **headers}
            if token is not None and hop.origin == first.origin:
                sent["Authorization"] = f"Bearer {token}"
            with JudgedConnection(
                *hop.origin, self._context, transfer, allow_private=self._allow_private
            ) as connection:
                connection.request("GET", hop.target, headers=sent)
                with connection.getresponse() as answer:
                    if answer.status not in _REDIRECTS:
                        yield _judged(answer)
                        return
                    hop = hop.then(answer.getheader("Location", ""))
        raise AdapterSourceUnavailable(f"there are more than {MAX_REDIRECTS} redirects")


def _judged(answer: http.client.HTTPResponse) -> http.client.HTTPResponse:
    status = answer.status
    if status in (200, 206):
        return answer
    if status in (401, 403, 404, 410):
        raise AdapterNotFound(f"the server answers {status}: there is no such file, or the token may not read it")
    raise AdapterSourceUnavailable(f"the server answers {status}")


class _Partial:
    """An archive under way, with the validator under which the rest of it may be asked for."""

    def __init__(self, scratch: Path) -> None:
        self._path, self._validator = scratch / "archive.part", scratch / "archive.etag"

    def headers(self) -> dict[str, str]:
        if not (self._path.exists() and self._validator.exists()):
            return {}
        return {"Range": f"bytes={self._path.stat().st_size}-", "If-Range": self._validator.read_text()}

    def append(self, answer: http.client.HTTPResponse, transfer: Transfer) -> None:
        """Write an answer's body. Raises AdapterTooLarge beyond `transfer.max_bytes`, AdapterSourceUnavailable."""
        start = self._start(answer)
        announced = answer.length
        if announced is not None and start + announced > transfer.max_bytes:
            raise AdapterTooLarge(
                f"the archive has {start + announced} bytes, more than adapters.max_bytes = {transfer.max_bytes}"
            )
        num_bytes = start
        with self._path.open("r+b" if start else "wb") as sink:
            sink.seek(start)
            sink.truncate()
            for chunk in iter(lambda: answer.read1(CHUNK_BYTES), b""):  # `read` waits until it has them all
                transfer.check()
                num_bytes += len(chunk)
                if num_bytes > transfer.max_bytes:
                    raise AdapterTooLarge(f"the archive exceeds adapters.max_bytes = {transfer.max_bytes}")
                sink.write(chunk)
        if announced is not None and num_bytes < start + announced:
            raise AdapterSourceUnavailable(f"the archive broke off after {num_bytes} bytes")

    def finish(self, archive: Path) -> None:
        self._path.rename(archive)

    def _start(self, answer: http.client.HTTPResponse) -> int:
        """From which byte on this answer goes; notes its validator where it goes from the beginning."""
        if answer.status == 206:
            start = self._path.stat().st_size
            if (answer.getheader("Content-Range") or "").startswith(f"bytes {start}-"):
                return start
            self._path.unlink()
            raise AdapterSourceUnavailable("the server sends another part of the archive than was asked for")
        etag = answer.getheader("ETag", "")
        self._validator.unlink(missing_ok=True)
        if etag.startswith('"'):  # a weak validator does not vouch for bytes
            self._validator.write_text(etag)
        return 0
