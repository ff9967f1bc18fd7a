"""Raw request bodies -> structs, strictly; what is wrong is told with the field's name."""

import re
from typing import Any, Generic, TypeVar

import msgspec
from litestar import Request
from litestar.exceptions import InternalServerException

from loraplex.gateway.errors import ClientLeft, MalformedRequest, NotJson, UnknownParameter

T = TypeVar("T")

_AT = re.compile(r" - at `\$(?P<path>.*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]*)`")
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")


class Body(Generic[T]):
    """A decoder for one type of body. Nothing is coerced: `"5"` is not a number."""

    def __init__(self, type: type[T]) -> None:
        self._decoder = msgspec.json.Decoder(type, strict=True)

    async def of(self, request: Request[Any, Any, Any]) -> T:
        """Raises MalformedRequest or UnknownParameter, or ClientLeft."""
        try:
            raw = await request.body()
        except InternalServerException as error:  # Litestar's word for a body that broke off
            raise ClientLeft("The client closed the connection before its request was complete.") from error
        return self.decode(raw)

    def decode(self, raw: bytes) -> T:
        if not raw.strip():
            raise NotJson("The request has no body; send a JSON object.")
        try:
            return self._decoder.decode(raw)
        except msgspec.ValidationError as error:
            raise _explain(str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise NotJson(f"The body is not valid JSON: {error}") from error


class Query(Generic[T]):
    """What may stand in a route's query, each name at most once; numbers are read as such."""

    def __init__(self, type: type[T]) -> None:
        self._type = type

    def of(self, request: Request[Any, Any, Any]) -> T:
        """Raises MalformedRequest or UnknownParameter."""
        given: dict[str, str] = {}
        for name, value in request.query_params.multi_items():
            if name in given:
                raise MalformedRequest(f"{name} is given more than once.", name)
            if not value.isprintable():
                raise MalformedRequest(f"Invalid value for {name}: it has characters that cannot be printed.", name)
            given[name] = value
        try:
            return msgspec.convert(given, self._type, strict=False)
        except msgspec.ValidationError as error:
            raise _explain(str(error)) from error


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
