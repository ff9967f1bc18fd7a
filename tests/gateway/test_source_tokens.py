"""What a tenant's own token opens at the hub, and for whom: registered, or named by a request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from support.adapter_files import adapter_files
from support.gateway import Gateway, running, settings_in
from support.hub_server import FakeHub, Repository, serve_hub
from support.problems import assert_problem

TOKEN = "hf_of_acme_alone"
SOURCE = "hf://acme/private"


@dataclass(frozen=True)
class World:
    """A gateway, a hub with the private repository acme/private, and two tenants, of which `acme` keeps its token."""

    home: Path
    gateway: Gateway
    hub: FakeHub
    private: Repository
    acme: str
    acme_key: str
    other: str
    other_key: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("tokens")
    settings = settings_in(home)
    with pytest.MonkeyPatch.context() as patch, serve_hub() as hub:
        patch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
        private, _ = hub.repository("acme/private", adapter_files())
        private.token = TOKEN
        adapters = msgspec.structs.replace(settings.adapters, hub_endpoint=hub.url, request_trust_seconds=0.0)
        with running(msgspec.structs.replace(settings, adapters=adapters), "k") as gateway, gateway.admin() as admin:
            acme, other = gateway.new_tenant("acme"), gateway.new_tenant("other")
            for tenant, _ in (acme, other):
                limits = {"request_adapters": ["hf://*"]}
                assert admin.put(f"/admin/v1/tenants/{tenant}/limits", json=limits).status_code == 200
            secret = admin.put(f"/admin/v1/tenants/{acme[0]}/secrets/hub_token", json={"value": TOKEN})
            assert secret.status_code == 200, secret.text
            yield World(home, gateway, hub, private, *acme, *other)


def manager(world: World, tenant: str) -> httpx.Client:
    with world.gateway.admin() as admin:
        made = admin.post(f"/admin/v1/tenants/{tenant}/keys", json={"role": "tenant-admin"})
    return world.gateway.client(made.json()["key"])


def generated(world: World, key: str, **parameters: Any) -> httpx.Response:
    """LoRAX's way to name an adapter that nobody registered."""
    body = {"inputs": "hi", "parameters": {"adapter_id": "acme/private", "adapter_source": "hub", **parameters}}
    with world.gateway.client(key) as client:
        return client.post("/generate", json=body)


def test_private_adapter_registers_with_its_tenants_token_and_no_other_tenant_gets_it(world: World) -> None:
    body = {"name": "private", "source": SOURCE}
    with manager(world, world.other) as other:
        assert_problem(other.post("/admin/v1/adapters", json=body), 404, "adapter_source_not_found")
    with world.gateway.admin() as admin:  # not even shared by an operator, and not with a token of its own either
        assert_problem(admin.post("/admin/v1/adapters", json=body), 404, "adapter_source_not_found")
    with manager(world, world.acme) as acme:
        made = acme.post("/admin/v1/adapters", json=body)
        assert (made.status_code, made.json()["state"], made.json()["tenant_id"]) == (201, "ready", world.acme)
        assert TOKEN not in made.text
    # its files are in the cache by now: that opens it to nobody
    with manager(world, world.other) as other:
        assert_problem(other.post("/admin/v1/adapters", json=body), 404, "adapter_source_not_found")
        assert_problem(other.get("/admin/v1/adapters/private"), 404, "adapter_not_found", "name")
    chat = {"model": "private", "messages": [{"role": "user", "content": "x"}]}
    with world.gateway.client(world.acme_key) as client:
        assert client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"] == "private: x"
    with world.gateway.client(world.other_key) as client:
        assert_problem(client.post("/v1/chat/completions", json=chat), 404, "model_not_found", "model")


def test_request_takes_its_tenants_token_where_it_brings_none(world: World) -> None:
    answer = generated(world, world.acme_key)
    assert (answer.status_code, answer.json()["generated_text"]) == (200, "acme/private: hi")
    assert generated(world, world.acme_key, api_token="hf_another").status_code == 404
    assert generated(world, world.other_key).status_code == 404
    assert generated(world, world.other_key, api_token=TOKEN).status_code == 200
    assert generated(world, world.other_key).status_code == 404


def test_deleted_token_opens_nothing_any_more(world: World) -> None:
    secret = f"/admin/v1/tenants/{world.other}/secrets/hub_token"
    with world.gateway.admin() as admin:
        assert admin.put(secret, json={"value": TOKEN}).status_code == 200
        assert generated(world, world.other_key).status_code == 200
        assert admin.delete(secret).status_code == 204
    assert generated(world, world.other_key).status_code == 404


def test_token_goes_to_the_hub_alone_and_into_no_file(world: World) -> None:
    used = [headers.get("authorization") for _, path, headers in world.hub.requests if "acme/private" in path]
    assert set(used) <= {None, f"Bearer {TOKEN}", "Bearer hf_another"}
    assert f"Bearer {TOKEN}" in used
    files = [path for path in world.home.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
