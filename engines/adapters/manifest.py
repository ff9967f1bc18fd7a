"""What an adapter in the cache consists of. Its id is the hash of this list, so the list cannot lie about the files."""

from __future__ import annotations

import hashlib
import json
import os
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


def write_manifest(directory: Path) -> Manifest:
    """Hash the files, make them read-only and durable, and write the list beside them."""
    files = tuple(_settle(directory / name) for name in sorted(os.listdir(directory)))
    manifest = Manifest(files=files)
    path = directory / MANIFEST
    path.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    _settle(path)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
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


def _settle(path: Path) -> ManifestFile:
    """Hash one file, write it through to the disk, take away the right to write it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        num_bytes = file.tell()
        os.fchmod(file.fileno(), 0o444)
        os.fsync(file.fileno())
    return ManifestFile(name=path.name, num_bytes=num_bytes, sha256=digest)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
