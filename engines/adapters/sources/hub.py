"""Adapters on a Hugging Face hub, at the commit that the revision named when it was asked.

Errors are told in our own words: those of the library quote addresses, and a signed address is a credential.
"""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import HfApi, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from loraplex.engines.adapters.sources.base import (
    SOCKET_TIMEOUT_SECONDS,
    Address,
    Listing,
    RemoteFile,
    Transfer,
    Workspace,
    missing,
    num_received,
    receive,
)
from loraplex.engines.adapters.sources.selection import select
from loraplex.engines.errors import AdapterError, AdapterInvalid, AdapterNotFound, AdapterSourceUnavailable

_URI = re.compile(r"hf://(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(@(?P<revision>[\w./-]{1,200}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# httpx.HTTPError or httpx2's: whichever this version of huggingface_hub was built on.
_TransportError: Any = HfHubHTTPError.__bases__[0]


class HubSource:
    """`hf://organisation/name` or `hf://organisation/name@revision`; a branch, a tag or a commit."""

    def __init__(self, endpoint: str | None) -> None:
        self._endpoint = endpoint

    def parse(self, uri: str) -> Address:
        match = _URI.fullmatch(uri.rstrip("/"))
        if match is None or any(word in match.group() for word in ("..", "--")) or "//" in match.group()[5:]:
            raise AdapterInvalid("this is not an address on the hub; write hf://organisation/name[@revision]")
        normal = f"hf://{match['repo']}@{match['revision'] or 'main'}"
        return Address(uri=normal, shown=normal)

    def at(self, address: Address, revision: str) -> Address:
        if not _COMMIT.fullmatch(revision):
            return address
        normal = f"hf://{_split(address)[0]}@{revision}"
        return Address(uri=normal, shown=normal)

    def list(self, address: Address, token: str | None, transfer: Transfer) -> Listing:
        repo, revision = _split(address)
        try:
            info = self._api(token).model_info(
                repo, revision=revision, files_metadata=True, timeout=SOCKET_TIMEOUT_SECONDS
            )
            sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
            commit = info.sha or ""
            if info.gated:  # anyone may list it, and what is known by its commit is not downloaded again
                self._require_access(repo, token)
        except _TransportError as error:
            raise _told(error) from None
        except HFValidationError as error:
            raise AdapterInvalid("the hub's library does not take this name") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterSourceUnavailable(
                f"the hub's answer is not a model's listing ({type(error).__name__})"
            ) from None
        if not _COMMIT.fullmatch(commit):
            raise AdapterSourceUnavailable("the hub names no commit for this revision")
        return Listing(revision=commit, files=tuple(_file(name, sizes[name]) for name in select(sizes)))

    def download(
        self, address: Address, listing: Listing, token: str | None, workspace: Workspace, transfer: Transfer
    ) -> None:
        """Over the library's connections, but without its own download: that asks for each file's size and ETag first,
        which the listing told already, and keeps a cache beside ours."""
        repo, _ = _split(address)
        headers = {"Accept-Encoding": "identity", **_authorization(token)}
        for file in missing(listing, workspace):
            transfer.check()
            start = num_received(file, workspace)
            start = start if start < file.num_bytes else 0
            asked = headers | ({"Range": f"bytes={start}-"} if start else {})
            url = hf_hub_url(repo, file.name, revision=listing.revision, endpoint=self._endpoint)
            try:
                with get_session().stream("GET", url, headers=asked, timeout=SOCKET_TIMEOUT_SECONDS) as answer:
                    hf_raise_for_status(answer)
                    start = start if answer.status_code == 206 else 0
                    receive(answer.iter_raw(), file, workspace, transfer, resume_at=start)
            except (_TransportError, OSError) as error:
                raise _told(error) from None

    def _require_access(self, repo: str, token: str | None) -> None:
        """`HfApi.auth_check`, with a timeout."""
        url = f"{self._api(token).endpoint}/api/models/{repo}/auth-check"
        hf_raise_for_status(get_session().get(url, headers=_authorization(token), timeout=SOCKET_TIMEOUT_SECONDS))

    def _api(self, token: str | None) -> HfApi:
        # False: never the token of whoever started this process, which a caller could not have used himself.
        return HfApi(endpoint=self._endpoint, token=token or False)


def _authorization(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}  # a redirect to another host goes without it


def _split(address: Address) -> tuple[str, str]:
    repo, _, revision = address.uri.removeprefix("hf://").partition("@")
    return repo, revision


def _file(name: str, size: int | None) -> RemoteFile:
    if type(size) is not int or size < 0:
        raise AdapterSourceUnavailable(f"the hub does not say how large {name} is")
    return RemoteFile(name=name, num_bytes=size)


def _told(error: Exception) -> AdapterError:
    """The error in our words. Not found covers what the token may not see: the hub does not tell them apart either."""
    if isinstance(error, GatedRepoError):
        return AdapterNotFound("the repository is gated; its owner must grant the token's account access")
    if isinstance(error, RevisionNotFoundError):
        return AdapterNotFound("the repository has no such revision")
    if isinstance(error, RemoteEntryNotFoundError):
        return AdapterNotFound("the repository lost a file that it had listed")
    if isinstance(error, DisabledRepoError):
        return AdapterNotFound("the hub has disabled this repository")
    if isinstance(error, RepositoryNotFoundError):
        return AdapterNotFound("there is no such repository, or the token may not read it")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403, 404):
            return AdapterNotFound(f"the hub answers {status}: there is no such adapter, or the token may not read it")
        return AdapterSourceUnavailable(f"the hub answers {status}")
    if isinstance(error, OSError) and error.errno is not None:
        return AdapterSourceUnavailable(f"the download cannot be written: {error.strerror}")
    return AdapterSourceUnavailable(f"the hub cannot be reached ({type(error).__name__})")
