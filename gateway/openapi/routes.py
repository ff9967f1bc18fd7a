"""GET /openapi.json, and /docs, a page that shows it; everything the page needs comes from this server."""

from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import msgspec
from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler

from loraplex.gateway.errors import NoSuchPage
from loraplex.gateway.openapi.document import document

_BUNDLE = Path(str(distribution("swagger-ui-py").locate_file("swagger_ui/static")))  # importing it would import yaml
_ASSETS = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-32x32.png": "image/png",
}
_START = """\
window.onload = () => SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true});
"""
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>loraplex API</title>
<link rel="icon" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# The bundle sets styles of elements and draws its icons from data: addresses.
_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"


def openapi_routes() -> list[HTTPRouteHandler]:
    """The handlers of this resource."""
    made: list[bytes] = []

    @get("/openapi.json")
    async def openapi(request: Request[Any, Any, Any]) -> Response[bytes]:
        if not made:
            made.append(msgspec.json.encode(document(request.app.routes)))
        return Response(made[0], media_type="application/json")

    @get("/docs")
    async def docs() -> Response[bytes]:
        headers = {"content-security-policy": _POLICY}
        return Response(_PAGE.encode(), media_type="text/html; charset=utf-8", headers=headers)

    @get("/docs/{name:str}")
    async def docs_asset(request: Request[Any, Any, Any]) -> Response[bytes]:
        name = request.path_params["name"]
        if name == "start.js":
            return Response(_START.encode(), media_type="text/javascript")
        if name not in _ASSETS:
            raise NoSuchPage(f"There is no page /docs/{name}.")
        return Response((_BUNDLE / name).read_bytes(), media_type=_ASSETS[name])

    return [openapi, docs, docs_asset]
