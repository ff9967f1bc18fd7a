"""What the tables of fields say is what the server does: not offered is refused by name, without effect is accepted."""

from __future__ import annotations

from typing import Any

import pytest
from conformance.api_fields import Field, Route, routes
from support.gateway import BASE, Gateway

CHAT = [{"role": "user", "content": "x"}]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": BASE, "messages": CHAT},
    "/v1/completions": {"model": BASE, "prompt": "x"},
    "/v1/responses": {"model": BASE, "input": "x"},
    "/v1/embeddings": {"model": BASE, "input": "x"},
    "/": {"inputs": "x"},
    "/invocations": {"inputs": "x"},
    "/generate": {"inputs": "x"},
    "/generate_stream": {"inputs": "x"},
    "/embed": {"inputs": "x"},
    "/tokenize": {"prompt": "x"},
    "/tokenize (messages)": {"messages": CHAT},
    "/detokenize": {"tokens": [1]},
    "/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "y"},
}
HARMLESS: dict[str, Any] = {"metadata": {"a": "b"}, "store": False}
CASES = [
    pytest.param(route, field, id=f"{route.path} {field.name}")
    for route in routes()
    for field in route.fields
    if field.state != "honoured" and route.path in GOOD
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
        assert post(gateway, route, field, HARMLESS.get(field.name, "x")).status_code == 200
        return
    asks = True if route.api == "LoRAX" else {"x": 1}
    response = post(gateway, route, field, asks)
    assert response.status_code in (400, 422), response.text
    told = response.json()["error"]
    message = told if route.api == "LoRAX" else told["message"]
    assert field.name.rpartition(".")[2] in message


def test_every_field_of_lorax_and_vllm_is_known() -> None:
    for route in routes():
        if route.api != "OpenAI":
            assert [field.name for field in route.fields if field.state == "refused"] == []
            assert len({field.name for field in route.fields}) == len(route.fields)
