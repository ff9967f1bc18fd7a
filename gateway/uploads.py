"""PEFT files in a multipart body -> an upload, written to the disk as they come and never held in memory.

    curl -F file=@adapter_config.json -F file=@adapter_model.safetensors …

A part is a file by its file name alone; what the store does not want is refused by name, before its bytes are read.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

from litestar import Request
from litestar.exceptions import InternalServerException
from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser, parse_options_header

from loraplex.engines.errors import AdapterTooLarge
from loraplex.gateway.errors import ClientLeft, MalformedRequest

_FLUSH_BYTES = 2**20
_MAX_PARTS = 16


class Incoming(Protocol):
    """An upload under way; leaving its context without `keep` leaves nothing behind. All of it blocks."""

    def open(self, name: str) -> None:
        """What comes next is of this file. Raises AdapterError for one that is no adapter's, or comes twice."""
        ...

    def write(self, data: bytes) -> None:
        """Raises AdapterTooLarge."""
        ...

    def keep(self) -> str:
        """The address of what was sent, from now on kept for good. Raises AdapterError for what is no adapter."""
        ...


async def receive_upload(request: Request[Any, Any, Any], upload: Incoming, seconds: float) -> str:
    """The upload's address. Raises MalformedRequest, AdapterError, or ClientLeft where the body broke off."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise MalformedRequest("Send the files as multipart/form-data.")
    try:
        async with asyncio.timeout(seconds):
            await _write(request.stream(), options["boundary"], upload)
    except TimeoutError as error:
        raise MalformedRequest(f"The files were not here within {seconds:g} s.") from error
    except ParserLimitReached as error:
        raise AdapterTooLarge(f"the upload is too large: {error}") from error
    except MultipartError as error:
        raise MalformedRequest(f"The body is no complete multipart/form-data: {error}") from error
    except InternalServerException as error:  # Litestar's word for a body that broke off
        raise ClientLeft("The client closed the connection before its upload was complete.") from error
    return await asyncio.to_thread(upload.keep)


async def _write(chunks: AsyncIterator[bytes], boundary: str, upload: Incoming) -> None:
    pending = bytearray()

    async def flush() -> None:
        if pending:
            await asyncio.to_thread(upload.write, bytes(pending))
            pending.clear()

    with PushMultipartParser(boundary, max_segment_count=_MAX_PARTS) as parser:
        async for chunk in chunks:
            if not chunk:
                continue
            for event in parser.parse(chunk):
                if isinstance(event, MultipartSegment):
                    if not event.filename:
                        raise MalformedRequest(
                            f"The part {event.name!r} is no file; options go into the query.", "file"
                        )
                    await asyncio.to_thread(upload.open, event.filename)
                elif event is None:
                    await flush()
                else:
                    pending += event
                    if len(pending) >= _FLUSH_BYTES:
                        await flush()
