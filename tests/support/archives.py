"""Archives in memory, honest and otherwise."""

from __future__ import annotations

import io
import tarfile
import warnings
import zipfile
from collections.abc import Iterable


def tar_gz(files: Iterable[tuple[str, bytes]], *members: tarfile.TarInfo) -> bytes:
    """A .tar.gz of (name, content) pairs and of further members without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for member in members:
            archive.addfile(member)
    return buffer.getvalue()


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A link, device or directory for `tar_gz`."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zipped(files: Iterable[tuple[str, bytes]], *, method: int = zipfile.ZIP_DEFLATED, mode: int = 0o100644) -> bytes:
    """A .zip of (name, content) pairs whose entries have this Unix mode."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the same name twice
        for name, content in files:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content, compress_type=method)
    return buffer.getvalue()
