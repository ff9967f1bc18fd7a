"""The served description: every route is in it, it is valid, its page needs nobody else, and the server keeps to it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from litestar import Litestar
from litestar.routes import HTTPRoute
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from support.gateway import Gateway, settings_in

from loraplex.gateway import app
from loraplex.gateway.batches.runner import BatchRunner
from loraplex.gateway.openapi.operations import OPERATIONS

METHODS = ("get", "post", "put", "patch", "delete")
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
# It would load the model anew at every example.
LEFT_OUT = {"POST /admin/v1/engine/reload"}


@pytest.fixture(scope="module")
def document(gateway: Gateway) -> dict[str, Any]:
    with gateway.client("no key at all") as client:
        response = client.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    found: dict[str, Any] = response.json()
    return found


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": item[method]
        for path, item in document["paths"].items()
        for method in METHODS
        if method in item
    }


def test_every_operation_described_is_a_route_and_every_route_of_v1_is_described(document: dict[str, Any]) -> None:
    found = operations(document)
    assert set(OPERATIONS) <= set(found), set(OPERATIONS) - set(found)
    assert {key for key in found if " /v1/" in key} <= set(OPERATIONS)


def test_every_route_of_the_app_is_in_the_document_and_no_other(
    gateway: Gateway, document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Litestar] = []

    def remember(*arguments: Any, **options: Any) -> Litestar:
        made.append(Litestar(*arguments, **options))
        return made[0]

    monkeypatch.setattr(app, "Litestar", remember)
    chosen = settings_in(tmp_path)
    services = gateway.services
    app.create_app(chosen, services, BatchRunner(services.batches, services.files, chosen.batches, 1))
    routes = {f"{method} {route.path_format}" for route in made[0].routes
              if isinstance(route, HTTPRoute) for method in route.methods if method != "OPTIONS"}  # fmt: skip
    assert len(routes) > 40
    assert set(operations(document)) == routes


def test_document_is_valid_and_its_references_lead_somewhere(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    schemas = document["components"]["schemas"]
    for name, schema in schemas.items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name)
    for reference in re.findall(r'"\$ref": ?"([^"]*)"', str(document).replace("'", '"')):
        assert reference.removeprefix("#/components/schemas/") in schemas
    ids = [operation["operationId"] for operation in operations(document).values()]
    assert len(ids) == len(set(ids))


def test_examples_are_what_their_schemas_say(document: dict[str, Any]) -> None:
    definitions = {"$defs": _moved(document["components"]["schemas"])}
    num_examples = 0
    for key, operation in operations(document).items():
        for media in operation.get("requestBody", {}).get("content", {}).values():
            if "example" in media:
                schema = {**_moved(media["schema"]), **definitions}
                jsonschema.Draft202012Validator(schema).validate(media["example"])
                num_examples += 1
                assert key in OPERATIONS
    assert num_examples >= 10


def _moved(schemas: Any) -> Any:
    """The same with references to where jsonschema looks for them."""
    return json.loads(json.dumps(schemas).replace("#/components/schemas/", "#/$defs/"))


def test_streams_say_their_media_type(document: dict[str, Any]) -> None:
    for key in ("POST /v1/chat/completions", "POST /v1/completions", "POST /generate_stream"):
        content = operations(document)[key]["responses"]["200"]["content"]
        assert "text/event-stream" in content


@pytest.mark.parametrize("path", ["/admin/v1/usage", "/admin/v1/usage/requests"])
@pytest.mark.parametrize("form", ["json", "csv"])
def test_usage_in_either_form_is_described(gateway: Gateway, document: dict[str, Any], path: str, form: str) -> None:
    with gateway.admin() as admin:
        kind = admin.get(path, params={"format": form}).headers["content-type"].partition(";")[0]
    content = operations(document)[f"GET {path}"]["responses"]["200"].get("content", {})
    assert form in kind
    assert not content or kind in content


def test_page_needs_nothing_from_elsewhere(gateway: Gateway) -> None:
    with gateway.client("no key at all") as client:
        page = client.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        found = re.findall(r'(?:src|href)="([^"]*)"', page.text)
        assert found
        for address in found:
            assert "//" not in address
            assert client.get(f"/{address}").status_code == 200, address
        assert "openapi.json" in client.get("/docs/start.js").text
        assert client.get("/docs/..%2fpyproject.toml").status_code == 404


def answers_as_described(gateway: Gateway, document: dict[str, Any], max_examples: int) -> None:
    """Requests that a machine makes up from the document, good and bad ones, and what the server does with them."""
    schema = schemathesis.openapi.from_dict(document)
    headers = {"Authorization": f"Bearer {gateway.admin_key}"}
    limits = settings(max_examples=max_examples, deadline=None, database=None, derandomize=True,
                      phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip

    def attempt(case: Any) -> None:
        response = case.call(base_url=gateway.url, headers=headers, timeout=30)
        assert response.status_code < 500 or is_elsewhere(response), (case.as_curl_command(), response.text)
        case.validate_response(response, checks=CHECKS)

    problems: list[str] = []
    for result in schema.get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]  # raises the error where it is one
        if operation.label not in LEFT_OUT:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                try:
                    limits(given(operation.as_strategy(mode))(attempt))()  # type: ignore[no-untyped-call]
                except Unsatisfiable:
                    assert mode == GenerationMode.NEGATIVE, f"{operation.label} takes nothing that can be made up"
                except (AssertionError, FailureGroup) as error:
                    problems.append(f"{operation.label}: {error}")
    assert not problems, "\n\n".join(problems)


def is_elsewhere(response: Any) -> bool:
    """Registering an adapter from a made-up address: that place does not answer."""
    return bool(response.status_code == 503 and response.json()["error"]["code"] == "adapter_source_unavailable")


@pytest.mark.timeout(300)
def test_server_answers_as_described(gateway: Gateway, document: dict[str, Any]) -> None:
    answers_as_described(gateway, document, max_examples=2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_server_answers_as_described_at_length(gateway: Gateway, document: dict[str, Any]) -> None:
    answers_as_described(gateway, document, max_examples=200)
