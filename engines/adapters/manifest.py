"""What an adapter in the cache consists of. Its id is the hash of this list, so the list cannot lie about the files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from loraplex.engines.errors import AdapterInvalid

MANIFEST = "manifest.json"


class ManifestFile(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    num_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The files, sorted by name."""

    files: tuple[ManifestFile, ...]

    @property
    def id(self) -> str:
        """sha256 over the JSON list of [name, sha256] pairs."""
        pairs = [[file.name, file.sha256] for file in self.files]
        return hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def write_manifest(directory: Path, digests: Mapping[str, str], *, durable: bool) -> Manifest:
    """Hash the files, but for those whose `digests` are known, make them read-only, and write the list beside them.

    Where it is `durable`, all of that outlives a loss of power.
    """
    manifest = Manifest(files=tuple(_entry(directory / name, digests) for name in sorted(os.listdir(directory))))
    (directory / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    for path in directory.iterdir():
        path.chmod(0o444)
        if durable:
            sync(path)
    if durable:
        sync(directory)
    return manifest


def check(directory: Path, *, read_bytes: bool) -> Manifest:
    """Hold a cached directory against its manifest and its name; sizes only without `read_bytes`.

    Raises FileNotFoundError where there is no such directory, AdapterInvalid naming what is wrong in it.
    """
    try:
        present = set(os.listdir(directory))
    except NotADirectoryError as error:
        raise AdapterInvalid(f"{directory.name} is not a directory") from error
    manifest = read_manifest(directory)
    if manifest.id != directory.name:
        raise AdapterInvalid(f"{MANIFEST} of {directory.name} lists other files")
    if surplus := present - {file.name for file in manifest.files} - {MANIFEST}:
        raise AdapterInvalid(f"{directory.name} has a file that is not its own: {min(surplus)}")
    for file in manifest.files:
        path = directory / file.name
        if file.name not in present or path.stat().st_size != file.num_bytes:
            raise AdapterInvalid(f"{file.name} of {directory.name} has not its {file.num_bytes} bytes")
        if read_bytes and _sha256(path) != file.sha256:
            raise AdapterInvalid(f"{file.name} of {directory.name} is damaged: its sha256 is not {file.sha256}")
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Raises AdapterInvalid where the list lacks or is broken."""
    try:
        return msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise AdapterInvalid(f"{MANIFEST} of {directory.name} cannot be read: {error}") from error


def sync(path: Path) -> None:
    """Write a file or a directory through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(path: Path, digests: Mapping[str, str]) -> ManifestFile:
    digest = digests.get(path.name) or _sha256(path)
    return ManifestFile(name=path.name, num_bytes=path.stat().st_size, sha256=digest)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
