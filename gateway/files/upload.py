"""multipart/form-data -> a file on disk, chunk by chunk; nothing of it is ever whole in memory."""

import re
import time
from typing import Any

from litestar import Request
from litestar.exceptions import InternalServerException
from multipart import (
    MultipartError,
    MultipartSegment,
    ParserLimitReached,
    PushMultipartParser,
    parse_options_header,
)

from loraplex.gateway.errors import ClientLeft, FileTooLarge, MalformedRequest, UnsupportedParameter
from loraplex.gateway.files.store import Draft, FileStore, StoredFile

FORM_BYTES = 2**16  # beside the file: boundaries, headers, the other fields
KEPT_SECONDS = 30 * 86400  # OpenAI's, for files of batches
_FIELD_BYTES = 1024
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


async def receive_file(request: Request[Any, Any, Any], tenant_id: str, store: FileStore) -> StoredFile:
    """The uploaded file, kept.

    Raises MalformedRequest, UnsupportedParameter, FileTooLarge, StorageFull or ClientLeft.
    """
    parser = _parser(request, store.max_file_bytes)
    draft = await store.open_draft(tenant_id)
    upload = _Upload(draft)
    try:
        with parser:
            async for chunk in request.stream():
                for event in parser.parse(chunk):
                    await upload.take(event)
        filename, expires_at = upload.checked()
        return await store.keep(draft, tenant_id, filename, "batch", expires_at)
    except InternalServerException as error:  # Litestar's word for a body that broke off
        raise ClientLeft("The client closed the connection before its file was complete.") from error
    except ParserLimitReached as error:
        raise FileTooLarge(f"A file may have at most {store.max_file_bytes} bytes ({error}).", "file") from error
    except (MultipartError, UnicodeDecodeError) as error:
        raise MalformedRequest(f"The body is not valid multipart/form-data: {error}") from error
    finally:
        await draft.close()


def _parser(request: Request[Any, Any, Any], max_bytes: int) -> PushMultipartParser:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise MalformedRequest("A file is uploaded as multipart/form-data, with the fields `file` and `purpose`.")
    try:
        return PushMultipartParser(options["boundary"], max_segment_size=max_bytes, max_segment_count=8)
    except MultipartError as error:
        raise MalformedRequest(f"The body is not valid multipart/form-data: {error}") from error


class _Upload:
    """The form's fields, as they come."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._segment: MultipartSegment | None = None
        self._filename: str | None = None
        self._fields: dict[str, bytes] = {}

    async def take(self, event: Any) -> None:
        """A segment's head, its bytes, or None for its end."""
        if event is None:
            self._segment = None
        elif self._segment is None:
            self._begin(event)
        elif self._segment.name == "file":
            await self._draft.write(bytes(event))
        else:
            name = str(self._segment.name)
            self._fields[name] += bytes(event)
            if len(self._fields[name]) > _FIELD_BYTES:
                raise MalformedRequest(f"{name} is too long.", name)

    def checked(self) -> tuple[str, float | None]:
        """(filename, when it expires)"""
        if self._filename is None:
            raise MalformedRequest("Missing required parameter: file", "file")
        purpose = self._fields.get("purpose", b"").decode()
        if not purpose:
            raise MalformedRequest("Missing required parameter: purpose", "purpose")
        if purpose != "batch":
            raise UnsupportedParameter("This server keeps files of the purpose 'batch' alone.", "purpose")
        return self._filename, time.time() + self._kept_seconds()

    def _begin(self, segment: MultipartSegment) -> None:
        name = str(segment.name)
        if name == "file" and self._filename is None:
            self._filename = _UNPRINTABLE.sub("_", (segment.filename or "").replace("\\", "/").split("/")[-1])[:256]
            self._filename = self._filename or "upload"
        elif name in _FIELDS and name not in self._fields:
            self._fields[name] = b""
        else:
            raise MalformedRequest(f"Unrecognized or repeated form field: {name[:64]}", name[:64])
        self._segment = segment

    def _kept_seconds(self) -> int:
        anchor, seconds = (self._fields.get(f"expires_after[{part}]") for part in ("anchor", "seconds"))
        if anchor is None and seconds is None:
            return KEPT_SECONDS
        if anchor != b"created_at":
            raise MalformedRequest("The anchor of an expiry is created_at.", "expires_after.anchor")
        text = (seconds or b"").decode()
        if not re.fullmatch(r"[0-9]{1,9}", text) or not 3600 <= int(text) <= KEPT_SECONDS:
            raise MalformedRequest(f"A file is kept from 3600 to {KEPT_SECONDS} seconds.", "expires_after.seconds")
        return int(text)
