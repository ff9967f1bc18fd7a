"""Structs -> JSON responses."""

import msgspec
from litestar import Response


def json_reply(value: msgspec.Struct, status: int = 200) -> Response[bytes]:
    """The struct as msgspec writes it."""
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")
