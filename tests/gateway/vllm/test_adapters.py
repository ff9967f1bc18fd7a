"""vLLM's calls that load and unload adapters: its bodies, answers and statuses, kept in the catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from support.gateway import Gateway, write_adapter

from loraplex.auth.caller import Caller
from loraplex.auth.limits.policy import Policy
from loraplex.config.settings import Adapters
from loraplex.engines.adapters.store import AdapterStore
from loraplex.gateway.vllm.adapters import _source

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def admin(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.admin() as client:
        yield client


def refused(response: httpx.Response, status: int, kind: str) -> str:
    """vLLM's shape of an error; its message."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (kind, status)
    message: str = error["message"]
    return message


def names(gateway: Gateway, key: str | None = None) -> set[str]:
    with gateway.client(key) as client:
        return {card["id"] for card in client.get("/v1/models").json()["data"]}


def test_adapter_is_loaded_served_listed_and_unloaded(gateway: Gateway, admin: httpx.Client) -> None:
    source = write_adapter(gateway.adapter_dir / "vllm-one", rank=5)
    loaded = admin.post(LOAD, json={"lora_name": "sql", "lora_path": str(source)})
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    assert "sql" in names(gateway)
    with gateway.client() as client:
        answer = client.post("/v1/completions", json={"model": "sql", "prompt": "x"})
        assert answer.json()["choices"][0]["text"] == "sql: x"
    entry = admin.get("/admin/v1/adapters/sql").json()
    assert entry["tenant_id"] is None
    again = admin.post(LOAD, json={"lora_name": "sql", "lora_path": str(source)})
    assert "load_inplace" in refused(again, 400, "InvalidUserInput")
    gone = admin.post(UNLOAD, json={"lora_name": "sql", "lora_int_id": None})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    assert "sql" not in names(gateway)
    assert "cannot be found" in refused(admin.post(UNLOAD, json={"lora_name": "sql"}), 404, "NotFoundError")


def test_load_inplace_serves_the_new_files(gateway: Gateway, admin: httpx.Client) -> None:
    first = write_adapter(gateway.adapter_dir / "vllm-first", rank=6)
    second = write_adapter(gateway.adapter_dir / "vllm-second", rank=7)
    for source in (first, second):
        body = {"lora_name": "changing", "lora_path": str(source), "load_inplace": True}
        assert admin.post(LOAD, json=body).status_code == 200
    assert admin.get("/admin/v1/adapters/changing").json()["card"]["rank"] == 7
    assert admin.post(UNLOAD, json={"lora_name": "changing"}).status_code == 200


def test_tenants_own_admin_loads_for_its_tenant_alone(gateway: Gateway, admin: httpx.Client) -> None:
    tenant, key = gateway.new_tenant("vllm-tenant")
    keys = f"/admin/v1/tenants/{tenant}/keys"
    manager = admin.post(keys, json={"role": "tenant-admin"}).json()["key"]
    source = write_adapter(gateway.adapter_dir / "vllm-own", rank=3)
    body = {"lora_name": "own", "lora_path": str(source)}
    with gateway.client(manager) as client:
        refused(client.post(LOAD, json=body), 403, "PermissionDeniedError")  # a directory that may be others'
        limits = {"request_adapters": ["file://*"]}
        assert admin.put(f"/admin/v1/tenants/{tenant}/limits", json=limits).status_code == 200
        assert client.post(LOAD, json=body).status_code == 200
        assert "own" in names(gateway, key)
        assert "own" not in names(gateway)
        refused(admin.post(UNLOAD, json={"lora_name": "own"}), 404, "NotFoundError")
        assert client.post(UNLOAD, json={"lora_name": "own"}).status_code == 200
    with gateway.client() as client:
        refused(client.post(LOAD, json=body), 403, "PermissionDeniedError")
    with httpx.Client(base_url=gateway.url) as client:
        refused(client.post(LOAD, json=body), 401, "AuthenticationError")


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        ({"lora_name": "", "lora_path": "x"}, 400, "InvalidUserInput", "must be provided"),
        ({"lora_name": "x", "lora_path": ""}, 400, "InvalidUserInput", "must be provided"),
        ({"lora_name": "x"}, 400, "BadRequestError", "lora_path"),
        ({"lora_name": "x", "lora_path": "y", "rank": 3}, 400, "BadRequestError", "rank"),
        ({"lora_name": "x", "lora_path": "y", "is_3d_lora_weight": True}, 400, "BadRequestError", "is_3d_lora_weight"),
        ({"lora_name": "../x", "lora_path": "{source}"}, 400, "BadRequestError", "not a model name"),
        ({"lora_name": "echo-base", "lora_path": "{source}"}, 400, "InvalidUserInput", "echo-base"),
        ({"lora_name": "x", "lora_path": "{source}/nothing"}, 404, "NotFoundError", "nothing"),
        ({"lora_name": "x", "lora_path": "/etc"}, 403, "PermissionDeniedError", "/etc"),
    ],
    ids=str,
)
def test_load_refuses_clearly(
    gateway: Gateway, admin: httpx.Client, body: dict[str, Any], status: int, kind: str, message: str
) -> None:
    source = str(gateway.adapter_dir / "shared")
    filled = {name: value.format(source=source) if isinstance(value, str) else value for name, value in body.items()}
    assert message in refused(admin.post(LOAD, json=filled), status, kind)
    assert "x" not in names(gateway)


class Catalogued:
    """As much of a catalogue as tells what an address leads to: the adapters' root has `acme/here`."""

    def __init__(self, root: Path) -> None:
        (root / "acme" / "here").mkdir(parents=True)
        self.store = AdapterStore(Adapters(local_roots=(str(root),), cache_dir=str(root / "cache")))


@pytest.mark.parametrize(
    ("role", "path", "expected"),
    [
        ("admin", "acme/here", "acme/here"),
        ("admin", "acme/elsewhere", "hf://acme/elsewhere"),
        ("admin", "acme/elsewhere@v2", "hf://acme/elsewhere@v2"),
        ("admin", "./acme/elsewhere", "./acme/elsewhere"),
        ("admin", "s3://bucket/x", "s3://bucket/x"),
        ("tenant-admin", "acme/here", "hf://acme/here"),  # it may not register from there, nor know of it
    ],
)
async def test_name_of_the_hub_is_taken_where_no_directory_is_called_so(
    tmp_path: Path, role: Literal["admin", "tenant-admin"], path: str, expected: str
) -> None:
    catalogue: Any = Catalogued(tmp_path)
    caller = Caller(tenant_id="t", tenant_name="t", key_id="k", role=role, policy=Policy())
    assert await _source(path, caller, catalogue) == expected
    await catalogue.store.close()


@pytest.mark.parametrize("body", [{"lora_name": ""}, {}, {"lora_name": None}, {"lora_name": "x", "force": True}])
def test_unload_refuses_clearly(admin: httpx.Client, body: dict[str, Any]) -> None:
    refused(admin.post(UNLOAD, json=body), 400, "BadRequestError" if body != {"lora_name": ""} else "InvalidUserInput")


def test_version_and_health_need_no_key(gateway: Gateway) -> None:
    with httpx.Client(base_url=gateway.url) as client:
        assert client.get("/version").json() == {"version": version("loraplex")}
        assert [client.get(path).status_code for path in ("/health", "/ping")] == [200, 200]
        assert client.post("/ping").status_code == 200
