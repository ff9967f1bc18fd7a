"""docs/api-compatibility.md says what the server does: not offered is refused by name, without effect is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import msgspec.inspect
import pytest
from conformance.api_fields import Field, Route, markdown, routes
from support.gateway import BASE, Gateway

CHAT = [{"role": "user", "content": "x"}]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": BASE, "messages": CHAT},
    "/v1/completions": {"model": BASE, "prompt": "x"},
    "/v1/responses": {"model": BASE, "input": "x"},
    "/v1/embeddings": {"model": BASE, "input": "x"},
    "/v1/batches": {"input_file_id": "x", "endpoint": "/v1/embeddings", "completion_window": "24h"},
    "/": {"inputs": "x"},
    "/invocations": {"inputs": "x"},
    "/generate": {"inputs": "x"},
    "/generate_stream": {"inputs": "x"},
    "/embed": {"inputs": "x"},
    "/tokenize": {"prompt": "x"},
    "/tokenize (messages)": {"messages": CHAT},
    "/detokenize": {"tokens": [1]},
    "/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "y"},
    "/v1/unload_lora_adapter": {"lora_name": "x"},
}
HARMLESS: dict[str, Any] = {"metadata": {"a": "b"}, "lora_int_id": 1}
CASES = [
    pytest.param(route, field, id=f"{route.path} {field.name}")
    for route in routes()
    for field in route.fields
    if field.state != "honoured"
]


def post(gateway: Gateway, route: Route, field: Field, value: Any) -> Any:
    body: dict[str, Any] = {**GOOD[route.path]}
    place, _, name = field.name.rpartition(".")
    body |= {place: {name: value}} if place else {name: value}
    with gateway.admin() if "lora_adapter" in route.path else gateway.client() as client:
        return client.post(route.path.partition(" ")[0], json=body)


@pytest.mark.parametrize(("route", "field"), CASES)
def test_field_that_is_not_honoured_does_what_its_row_says(gateway: Gateway, route: Route, field: Field) -> None:
    if field.state == "no effect":
        response = post(gateway, route, field, HARMLESS.get(field.name, "x"))
        there_is_none = route.path == "/v1/unload_lora_adapter"
        assert response.status_code == (404 if there_is_none else 200), response.text
        return
    asks = True if route.api == "LoRAX" else {"x": 1}
    response = post(gateway, route, field, asks)
    assert response.status_code in (400, 422), response.text
    told = response.json()["error"]
    message = told if route.api == "LoRAX" else told["message"]
    assert field.name.rpartition(".")[2] in message


@pytest.mark.parametrize(
    ("route", "field", "value"),
    [
        pytest.param(route, field, value, id=f"{route.path} {field.name} {json.dumps(value)}")
        for route in routes()
        for field in route.fields
        if field.harmless is not None
        for value in (None, *field.harmless)
    ],
)
def test_field_that_is_not_offered_is_taken_where_it_asks_for_nothing(
    gateway: Gateway, route: Route, field: Field, value: Any
) -> None:
    response = post(gateway, route, field, value)
    assert response.status_code < 300 or field.name not in response.text, response.text


@pytest.mark.parametrize("route", routes(), ids=lambda route: f"{route.api} {route.path}")
def test_field_that_takes_one_value_alone_is_not_told_as_offered(route: Route) -> None:
    """Whatever else it may say would be refused: that is for `not_offered` to tell."""
    told = {field.name: field.state for field in route.fields}
    for prefix, struct in route.structs:
        for field in msgspec.inspect.type_info(struct).fields:  # type: ignore[attr-defined]
            if field.required or told[f"{prefix}{field.encode_name}"] not in ("honoured", "no effect"):
                continue
            types = field.type.types if isinstance(field.type, msgspec.inspect.UnionType) else (field.type,)
            values = [value for one in types if isinstance(one, msgspec.inspect.LiteralType) for value in one.values]
            is_open = any(not isinstance(one, msgspec.inspect.LiteralType | msgspec.inspect.NoneType) for one in types)
            assert is_open or len(values) > 1, field.name


@pytest.mark.parametrize("route", routes(), ids=lambda route: f"{route.api} {route.path}")
def test_field_that_nobody_knows_is_refused_by_name(gateway: Gateway, route: Route) -> None:
    places = {field.name.rpartition(".")[0] for field in route.fields}
    for name in (f"{place}.colour" if place else "colour" for place in places if place.count(".") == 0):
        response = post(gateway, route, Field(name, "refused"), 1)
        assert response.status_code in (400, 422), response.text
        assert "colour" in response.text


def test_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "api-compatibility.md"
    assert page.read_text() == markdown(), (
        "PYTHONPATH=.src:tests python -m conformance.api_fields > docs/api-compatibility.md"
    )


def test_every_field_of_lorax_and_vllm_is_known() -> None:
    for route in routes():
        if route.api != "OpenAI":
            assert [field.name for field in route.fields if field.state == "refused"] == []
            assert len({field.name for field in route.fields}) == len(route.fields)
