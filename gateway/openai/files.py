"""/v1/files: upload, list, show, delete, download."""

from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, Response, delete, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.response import Stream
from msgspec import Struct

from loraplex.gateway.decoding import Query
from loraplex.gateway.files.store import FileStore, StoredFile
from loraplex.gateway.files.upload import FORM_BYTES, receive_file
from loraplex.gateway.guards import caller_of, require_inference
from loraplex.gateway.replies import json_reply


class FileObject(Struct):
    """A file as OpenAI shows it. Times are seconds since 1970."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"


class FileList(Struct):
    """One page. `first_id` and `last_id` are cursors."""

    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"] = "list"


class FileDeleted(Struct):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileQuery(Struct, forbid_unknown_fields=True):
    """Which files to list; newest first unless `order` says otherwise."""

    purpose: str | None = None
    after: str | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"


_query = Query(FileQuery)


def file_routes(files: FileStore) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    async def found(request: Request[Any, Any, Any]) -> StoredFile:
        return await files.get(caller_of(request).tenant_id, request.path_params["file_id"])

    @post(
        "/v1/files",
        status_code=200,
        guards=[require_inference],
        request_max_body_size=files.max_file_bytes + FORM_BYTES,
    )
    async def create_file(request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_reply(_shown(await receive_file(request, caller_of(request).tenant_id, files)))

    @get("/v1/files", guards=[require_inference])
    async def list_files(request: Request[Any, Any, Any]) -> Response[bytes]:
        wanted = _query.of(request)
        page, has_more = await files.page(
            caller_of(request).tenant_id,
            purpose=wanted.purpose,
            after=wanted.after,
            limit=wanted.limit,
            order=wanted.order,
        )
        shown = [_shown(file) for file in page]
        first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
        return json_reply(FileList(shown, has_more, first, last))

    @get("/v1/files/{file_id:str}", guards=[require_inference])
    async def retrieve_file(request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_reply(_shown(await found(request)))

    @get("/v1/files/{file_id:str}/content", guards=[require_inference])
    async def retrieve_file_content(request: Request[Any, Any, Any]) -> Stream:
        file = await found(request)
        headers = {"content-length": str(file.num_bytes), "content-disposition": "attachment"}
        return Stream(files.chunks(file), media_type="application/octet-stream", headers=headers)

    @delete("/v1/files/{file_id:str}", status_code=200, guards=[require_inference])
    async def delete_file(request: Request[Any, Any, Any]) -> Response[bytes]:
        file_id = request.path_params["file_id"]
        await files.delete(caller_of(request).tenant_id, file_id)
        return json_reply(FileDeleted(file_id))

    return [create_file, list_files, retrieve_file, retrieve_file_content, delete_file]


def _shown(file: StoredFile) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.num_bytes,
        created_at=int(file.created_at),
        filename=file.filename,
        purpose=file.purpose,
        expires_at=None if file.expires_at is None else int(file.expires_at),
    )
