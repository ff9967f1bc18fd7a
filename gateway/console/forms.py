"""Files as multipart/form-data, read piece by piece while they are sent."""

import os
import secrets
from collections.abc import Iterator, Mapping
from typing import BinaryIO

_PIECE_BYTES = 2**20


def multipart_form(files: Mapping[str, BinaryIO]) -> tuple[dict[str, str], Iterator[bytes]]:
    """(headers, body) of a form whose parts are these files by name; our names need no quoting."""
    boundary = secrets.token_hex(16)
    parts = [(_head(boundary, name), file) for name, file in files.items()]
    tail = f"--{boundary}--\r\n".encode()
    num_bytes = sum(len(head) + os.fstat(file.fileno()).st_size + len(b"\r\n") for head, file in parts) + len(tail)
    headers = {"content-type": f"multipart/form-data; boundary={boundary}", "content-length": str(num_bytes)}
    return headers, _body(parts, tail)


def _head(boundary: str, name: str) -> bytes:
    lines = (
        f"--{boundary}",
        f'Content-Disposition: form-data; name="file"; filename="{name}"',
        "Content-Type: application/octet-stream",
    )
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


def _body(parts: list[tuple[bytes, BinaryIO]], tail: bytes) -> Iterator[bytes]:
    for head, file in parts:
        yield head
        while piece := file.read(_PIECE_BYTES):
            yield piece
        yield b"\r\n"
    yield tail
