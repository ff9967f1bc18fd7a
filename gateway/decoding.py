"""Raw request bodies -> structs, strictly; what is wrong is told with the field's name."""

import math
import re
from typing import Any, Generic, TypeVar

import msgspec
import msgspec.inspect
from litestar import Request
from litestar.exceptions.http_exceptions import RequestEntityTooLarge

from loraplex.gateway.errors import ClientLeft, MalformedRequest, NotJson, UnknownParameter, UnsupportedEncoding

T = TypeVar("T")

_AT = re.compile(r" - at `\$(?P<path>.*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]*)`")
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")


class Body(Generic[T]):
    """A decoder for one type of body. Nothing is coerced: `"5"` is not a number."""

    def __init__(self, type: type[T]) -> None:
        self._decoder = msgspec.json.Decoder(type, strict=True)

    async def of(self, request: Request[Any, Any, Any]) -> T:
        """Raises MalformedRequest, UnknownParameter or UnsupportedEncoding, ClientLeft or RequestEntityTooLarge."""
        return self.told(request, await read(request))

    def told(self, request: Request[Any, Any, Any], raw: bytes) -> T:
        """What a request's body says. Raises MalformedRequest, UnknownParameter or UnsupportedEncoding."""
        try:
            return self.decode(raw)
        except NotJson:
            encoding = request.headers.get("content-encoding", "identity")
            if encoding.lower() != "identity":
                raise UnsupportedEncoding(
                    f"The body must be sent as it is, without Content-Encoding: {encoding}."
                ) from None
            raise

    def decode(self, raw: bytes) -> T:
        if not raw.strip():
            raise NotJson("The request has no body; send a JSON object.")
        try:
            return self._decoder.decode(raw)
        except msgspec.ValidationError as error:
            raise _explain(str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise NotJson(f"The body is not valid JSON: {error}") from error


async def read(request: Request[Any, Any, Any]) -> bytes:
    """The whole body, within the route's bound. Raises ClientLeft or RequestEntityTooLarge.

    Litestar's own reads every header for the length, and passes each piece through an async generator.
    """
    most = request.route_handler.resolve_request_max_body_size() or math.inf
    announced = next((value for name, value in request.scope["headers"] if name == b"content-length"), b"0")
    if int(announced) > most:
        raise RequestEntityTooLarge
    pieces: list[bytes] = []
    num_bytes, is_whole = 0, False
    while not is_whole:
        message = await request.receive()
        if message["type"] != "http.request":
            raise ClientLeft("The client closed the connection before its request was complete.")
        pieces.append(message.get("body", b""))
        num_bytes += len(pieces[-1])
        if num_bytes > most:
            raise RequestEntityTooLarge
        is_whole = not message.get("more_body", False)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Query(Generic[T]):
    """What may stand in a route's query; numbers and dates are read as such.

    A name stands there once, unless its field is a list: then often, as `name=a&name=b` or `name[]=a&name[]=b`.
    """

    def __init__(self, type: type[T]) -> None:
        self._type = type
        fields = msgspec.inspect.type_info(type).fields  # type: ignore[attr-defined]
        self._lists = {field.encode_name for field in fields if _takes_list(field.type)}

    def of(self, request: Request[Any, Any, Any]) -> T:
        """Raises MalformedRequest or UnknownParameter."""
        given: dict[str, Any] = {}
        for name, value in request.query_params.multi_items():
            if not value.isprintable():
                raise MalformedRequest(f"Invalid value for {name}: it has characters that cannot be printed.", name)
            if (listed := name.removesuffix("[]")) in self._lists:
                given.setdefault(listed, []).append(value)
            elif name in given:
                raise MalformedRequest(f"{name} is given more than once.", name)
            else:
                given[name] = value
        try:
            return msgspec.convert(given, self._type, strict=False)
        except msgspec.ValidationError as error:
            raise _explain(str(error)) from error


def _takes_list(type: msgspec.inspect.Type) -> bool:
    of = type.types if isinstance(type, msgspec.inspect.UnionType) else (type,)
    return any(isinstance(each, msgspec.inspect.ListType) for each in of)


def _explain(text: str) -> MalformedRequest | UnknownParameter:
    at = _AT.search(text)
    path = at["path"].lstrip(".") if at else ""
    message = text[: at.start()] if at else text
    if unknown := _UNKNOWN.search(message):
        name = f"{path}.{unknown['name']}".lstrip(".")
        return UnknownParameter(f"Unrecognized request argument: {name}", name)
    if missing := _MISSING.search(message):
        name = f"{path}.{missing['name']}".lstrip(".")
        return MalformedRequest(f"Missing required parameter: {name}", name)
    return MalformedRequest(f"Invalid value for {path or 'the body'}: {message}", path or None)
