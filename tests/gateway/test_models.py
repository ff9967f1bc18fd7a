"""/v1/models: what a card tells of an adapter, at each time of its life, and who may delete one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from support.gateway import BASE, Gateway, write_adapter
from support.problems import assert_problem


@pytest.fixture(scope="module")
def manager(gateway: Gateway) -> Iterator[httpx.Client]:
    """A key that manages the tenant."""
    with gateway.admin() as admin:
        path = f"/admin/v1/tenants/{gateway.tenant_id}/keys"
        key = admin.post(path, json={"role": "tenant-admin"}).json()["key"]
    with gateway.client(key) as client:
        yield client


def register(gateway: Gateway, name: str, rank: int, **more: Any) -> str:
    """An adapter of the tenant's own; its source."""
    source = write_adapter(gateway.adapter_dir / f"{name.replace('/', '-')}-{rank}", rank=rank)
    body = {"name": name, "source": str(source), "tenant_id": gateway.tenant_id, **more}
    with gateway.admin() as admin:
        made = admin.post("/admin/v1/adapters", json=body)
        assert made.status_code in (201, 202), made.text
    return f"file://{source}"


def test_card_tells_base_adapter_and_state(gateway: Gateway) -> None:
    source = register(gateway, "org/told", 3)
    with gateway.client() as client:
        card = client.get("/v1/models/org%2Ftold").json()
        assert card in client.get("/v1/models").json()["data"]
        base = client.get(f"/v1/models/{BASE}").json()
    assert (card["id"], card["parent"], card["state"]) == ("org/told", BASE, "ready")
    assert card["root"] == source
    assert (card["adapter"]["version"], card["adapter"]["rank"], len(card["adapter"]["id"])) == (1, 3, 64)
    assert (base["root"], base["parent"], base["state"], base["adapter"]) == (BASE, None, "ready", None)
    assert card["max_model_len"] == base["max_model_len"] > 0


def test_version_is_shown_by_its_number_and_hash(gateway: Gateway) -> None:
    register(gateway, "org/twice", 5)
    second = write_adapter(gateway.adapter_dir / "org-twice-6", rank=6)
    with gateway.admin() as admin:
        changed = admin.patch(
            f"/admin/v1/adapters/org/twice?tenant_id={gateway.tenant_id}", json={"source": str(second)}
        )
        assert changed.status_code == 200, changed.text
    with gateway.client() as client:
        shown = {name: client.get(f"/v1/models/org/twice{name}").json() for name in ("", "@1", "@2")}
        by_hash = client.get(f"/v1/models/org/twice@{shown['@1']['adapter']['id'][:12]}").json()
        assert_problem(client.get("/v1/models/org/twice@3"), 404, "model_not_found", "model")
    assert {name: (card["id"], card["adapter"]["rank"]) for name, card in shown.items()} == {
        "": ("org/twice", 6),
        "@1": ("org/twice@1", 5),
        "@2": ("org/twice@2", 6),
    }
    assert by_hash["adapter"] == shown["@1"]["adapter"]


def test_adapter_that_failed_is_shown_and_not_listed(gateway: Gateway) -> None:
    source = write_adapter(gateway.adapter_dir / "broken", rank=7)
    (source / "adapter_model.safetensors").write_bytes(b"no safetensors")
    body = {"name": "broken", "source": str(source), "tenant_id": gateway.tenant_id, "wait": False}
    with gateway.admin() as admin, gateway.client() as client:
        assert admin.post("/admin/v1/adapters", json=body).status_code == 202
        deadline = time.monotonic() + 10
        while (card := client.get("/v1/models/broken").json())["state"] != "failed":
            assert card["state"] in ("registered", "fetching")
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert card["adapter"] == {"version": 1, "id": "", "rank": None}
        assert "broken" not in [one["id"] for one in client.get("/v1/models").json()["data"]]
    shutil.rmtree(source)


def test_sdk_deletes_what_its_key_manages(gateway: Gateway, manager: httpx.Client) -> None:
    register(gateway, "org/mine", 8)
    key = manager.headers["authorization"].removeprefix("Bearer ")
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as sdk:
        deleted = sdk.models.delete("org/mine")
        assert (deleted.id, deleted.deleted, deleted.object) == ("org/mine", True, "model")
        with pytest.raises(openai.NotFoundError):
            sdk.models.retrieve("org/mine")
        with pytest.raises(openai.NotFoundError):
            sdk.models.delete("org/mine")
    with gateway.admin() as admin:
        [entry, *_] = admin.get("/admin/v1/audit").json()["data"]
    assert (entry["action"], entry["tenant_id"]) == ("delete_model", gateway.tenant_id)


def test_delete_of_what_is_not_ones_own_says_so(gateway: Gateway, manager: httpx.Client) -> None:
    with gateway.client() as client:
        assert_problem(client.delete("/v1/models/team/echo-one"), 403, "not_allowed")
    message = assert_problem(manager.delete("/v1/models/team%2Fecho-one"), 404, "model_not_found", "model")
    assert "not yours to delete" in message
    message = assert_problem(manager.delete(f"/v1/models/{BASE}"), 400, "invalid_request", "model")
    assert "base model" in message
    with gateway.client() as client:
        assert client.get("/v1/models/team/echo-one").status_code == 200


def test_shared_adapter_and_route_are_an_admins_to_delete(gateway: Gateway) -> None:
    source = str(write_adapter(gateway.adapter_dir / "for-all", rank=9))
    with gateway.admin() as admin:
        assert admin.post("/admin/v1/adapters", json={"name": "for-all", "source": source}).status_code == 201
        route = {"name": "a-way", "targets": [{"model": "for-all", "weight": 1}]}
        assert admin.post("/admin/v1/routes", json=route).status_code == 201
        assert admin.get("/v1/models/a-way").json()["adapter"] is None
        assert_problem(admin.delete("/v1/models/for-all"), 409, "adapter_in_use")
        assert admin.delete("/v1/models/a-way").json() == {"id": "a-way", "deleted": True, "object": "model"}
        assert admin.delete("/v1/models/for-all").status_code == 200
