"""Routes and operations -> one OpenAPI 3.1 document."""

import inspect
import re
from collections.abc import Iterable
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

import msgspec
from litestar.handlers import HTTPRouteHandler
from litestar.routes import BaseRoute, HTTPRoute

from loraplex.gateway.openapi.operations import OPERATIONS, Operation

_REF = "#/components/schemas/{name}"
_JSON = "application/json"


class ErrorBody(msgspec.Struct):
    """What is wrong. `param` names the field that is to blame, `code` what programs may rely on."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(msgspec.Struct):
    """The shape of every error of /v1 and /admin/v1."""

    error: ErrorBody


class FlatErrorReply(msgspec.Struct):
    """The shape of errors of LoRAX's routes."""

    error: str
    error_type: str


class VllmErrorBody(msgspec.Struct):
    """What is wrong. `code` is the status."""

    message: str
    type: str
    param: str | None
    code: int


class VllmErrorReply(msgspec.Struct):
    """The shape of errors of vLLM's adapter calls."""

    error: VllmErrorBody


def document(routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """Every route that there is; one that nobody has described appears with what its path says."""
    found = list(_handlers(routes))
    shapes = _Shapes([shape for key, _, _ in found for shape in _shapes(OPERATIONS.get(key, Operation()))])
    paths: dict[str, Any] = {}
    for key, route, handler in found:
        method, path = key.split(" ", 1)
        paths.setdefault(path, {})[method.lower()] = _operation(key, route, handler, shapes)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "loraplex",
            "version": version("loraplex"),
            "description": "One base model, many LoRA adapters, one OpenAI-compatible address.",
        },
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": shapes.components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key."}},
        },
    }


def _handlers(routes: Iterable[BaseRoute]) -> Iterable[tuple[str, HTTPRoute, HTTPRouteHandler]]:
    """("METHOD /path", route, handler); OPTIONS, which Litestar answers by itself, is left out."""
    for route in routes:
        if isinstance(route, HTTPRoute):
            for method, (handler, _) in route.route_handler_map.items():
                if method != "OPTIONS":
                    yield f"{method} {route.path_format}", route, handler


class _Shapes:
    """The schemas of every struct in use, and a reference to any of them."""

    def __init__(self, types: list[Any]) -> None:
        distinct = list({repr(shape): shape for shape in (*types, ErrorReply, FlatErrorReply, VllmErrorReply)}.values())
        schemas, self.components = msgspec.json.schema_components(distinct, ref_template=_REF)
        self._schemas = {repr(shape): schema for shape, schema in zip(distinct, schemas, strict=True)}

    def of(self, shape: Any) -> dict[str, Any]:
        if isinstance(shape, tuple):
            return {"anyOf": [self.of(one) for one in shape]}
        return self._schemas[repr(shape)]

    def resolved(self, shape: Any) -> dict[str, Any]:
        """The struct's own schema rather than a reference to it."""
        found: dict[str, Any] = self.components[self.of(shape)["$ref"].rpartition("/")[2]]
        return found


def _shapes(operation: Operation) -> list[Any]:
    used = (operation.body, operation.form, operation.query, operation.answer, operation.frames)
    several = [one for shape in used for one in (shape if isinstance(shape, tuple) else (shape,))]
    return [shape for shape in several if shape is not None and not isinstance(shape, str)]


def _operation(key: str, route: HTTPRoute, handler: HTTPRouteHandler, shapes: _Shapes) -> dict[str, Any]:
    told = OPERATIONS.get(key, Operation())
    made: dict[str, Any] = {
        "operationId": re.sub(r"[^a-z0-9]+", "_", key.lower()).strip("_"),
        "summary": handler.handler_name.replace("_", " ").capitalize(),
        "tags": [_tag(route.path_format)],
        "responses": _responses(route, handler, told, shapes),
    }
    if doc := inspect.getdoc(handler.fn):
        made["description"] = doc
    if parameters := [*_path_parameters(route), *_query_parameters(told, shapes)]:
        made["parameters"] = parameters
    if told.form is not None:
        made["requestBody"] = _content("multipart/form-data", shapes.of(told.form), required=True)
    if told.body is not None:
        made["requestBody"] = _content(_JSON, shapes.of(told.body), required=True)
        if told.example is not None:
            made["requestBody"]["content"][_JSON]["example"] = told.example
    if any(guard.__name__.startswith("require_") for guard in handler.guards or ()):
        made["security"] = [{"key": []}]
    return made


def _responses(route: HTTPRoute, handler: HTTPRouteHandler, told: Operation, shapes: _Shapes) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if isinstance(told.answer, str):
        content[told.answer] = {"schema": {"type": "string"}}
    elif told.answer is not None:
        content[_JSON] = {"schema": shapes.of(told.answer)}
    if told.text is not None:
        content[told.text] = {"schema": {"type": "string"}}
    if told.frames is not None:
        data = {"type": "string", "contentMediaType": _JSON, "contentSchema": shapes.of(told.frames)}
        events = "Server-sent events. The data of each is JSON of this form; `[DONE]` ends the streams of /v1."
        event = {"type": "object", "description": events, "properties": {"data": data}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}
    success = {"description": HTTPStatus(handler.status_code).phrase, **({"content": content} if content else {})}
    error = {"anyOf": [shapes.of(kind) for kind in _error_kinds(route.path_format)]}
    told_errors = {
        str(status): {"description": HTTPStatus(status).phrase, "content": {_JSON: {"schema": error}}}
        for status in told.errors
    }
    return {str(handler.status_code): success, **told_errors}


def _path_parameters(route: HTTPRoute) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in route.path_parameters
    ]


def _query_parameters(told: Operation, shapes: _Shapes) -> list[dict[str, Any]]:
    if told.query is None:
        return []
    schema = shapes.resolved(told.query)
    return [
        {"name": name, "in": "query", "required": name in schema.get("required", ()), "schema": field}
        for name, field in schema["properties"].items()
    ]


def _content(media_type: str, schema: dict[str, Any], *, required: bool) -> dict[str, Any]:
    return {"required": required, "content": {media_type: {"schema": schema}}}


def _error_kinds(path: str) -> list[Any]:
    """The shapes of a route's errors; what goes wrong before any route has its say has the first one."""
    if path.endswith("load_lora_adapter"):
        return [ErrorReply, VllmErrorReply]
    return [ErrorReply, FlatErrorReply] if _is_lorax(path) else [ErrorReply]


def _is_lorax(path: str) -> bool:
    return not path.startswith(("/v1", "/admin", "/health", "/ping", "/metrics", "/openapi", "/docs"))


def _tag(path: str) -> str:
    if path.startswith("/admin"):
        return "Administration"
    if path.startswith("/v1"):
        return "OpenAI"
    return "LoRAX" if _is_lorax(path) else "Operations"
