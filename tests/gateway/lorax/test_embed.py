"""LoRAX's /embed and /tokenize, with the bodies its client sends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.flat import assert_flat
from support.gateway import Gateway


def embed(gateway: Gateway, inputs: str, **parameters: Any) -> Any:
    with gateway.client() as client:
        response = client.post("/embed", json={"inputs": inputs, "parameters": parameters or None, "stream": False})
    assert response.status_code == 200, response.text
    assert list(response.json()) == ["embeddings"]
    return response.json()["embeddings"]


def test_embed_equals_openais_of_the_same_model(gateway: Gateway) -> None:
    with gateway.client() as client:
        for adapter_id, model in ((None, "echo-base"), ("team/echo-one", "team/echo-one")):
            theirs = client.post("/v1/embeddings", json={"model": model, "input": "abc"}).json()
            assert embed(gateway, "abc", adapter_id=adapter_id) == theirs["data"][0]["embedding"]
    assert embed(gateway, "abc") != embed(gateway, "abc", adapter_id="team/echo-one")
    merged = {"ids": ["team/echo-one"], "weights": [1.0]}
    assert embed(gateway, "abc", merged_adapters=merged) == pytest.approx(
        embed(gateway, "abc", adapter_id="team/echo-one")
    )
    assert embed(gateway, "xyzabc", truncate=3) == embed(gateway, "abc")


@pytest.mark.parametrize(
    ("body", "status", "error_type", "message"),
    [
        ({"inputs": ""}, 422, "validation", "`inputs` cannot be empty"),
        ({"inputs": "a", "stream": True}, 422, "validation", "`stream`"),
        ({"inputs": "a", "parameters": {"truncate": 0}}, 422, "validation", "`truncate`"),
        ({"inputs": "a", "parameters": {"temperature": 1}}, 422, "validation", "parameters.temperature"),
        ({"inputs": ["a"]}, 422, "validation", "inputs"),
        ({"inputs": "a" * 513}, 422, "validation", "513"),
        ({"inputs": "a", "parameters": {"adapter_id": "no/such"}}, 404, "adapter_not_found", "no/such"),
    ],
    ids=str,
)
def test_embed_refuses_by_name(
    gateway: Gateway, body: dict[str, Any], status: int, error_type: str, message: str
) -> None:
    with gateway.client() as client:
        assert message in assert_flat(client.post("/embed", json=body), status, error_type)


@pytest.mark.parametrize("special", [None, True, False])
def test_tokenize_tells_places(gateway: Gateway, special: bool | None) -> None:
    with gateway.client() as client:
        response = client.post("/tokenize", json={"inputs": "hé!", "add_special_tokens": special})
    assert response.json() == [
        {"id": 104, "text": "h", "start": 0, "stop": 1},
        {"id": 195, "text": "é", "start": 1, "stop": 2},
        {"id": 169, "text": "é", "start": 1, "stop": 2},
        {"id": 33, "text": "!", "start": 2, "stop": 3},
    ]


@pytest.mark.parametrize("body", [{"inputs": 5}, {"inputs": "a", "model": "x"}, {"inputs": "a", "prompt": "b"}])
def test_tokenize_refuses_in_loraxs_shape(gateway: Gateway, body: dict[str, Any]) -> None:
    with gateway.client() as client:
        assert_flat(client.post("/tokenize", content=json.dumps(body)), 422, "validation")
