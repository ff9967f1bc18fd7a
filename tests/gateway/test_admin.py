"""The operator's API: tenants, keys, adapters, and who may touch what."""

from __future__ import annotations

import time
from pathlib import Path
from urllib.parse import quote

import pytest
from support.gateway import BASE, Gateway, running, settings_in, write_adapter
from support.problems import assert_problem

from loraplex.engines.errors import EngineUnavailable


def names(gateway: Gateway, key: str | None = None) -> list[str]:
    with gateway.client(key) as client:
        return [model["id"] for model in client.get("/v1/models").json()["data"]]


def test_tenant_and_key_live_their_life(gateway: Gateway) -> None:
    with gateway.admin() as admin:
        tenant = admin.post("/admin/v1/tenants", json={"name": "acme"})
        assert tenant.status_code == 201
        path = f"/admin/v1/tenants/{tenant.json()['id']}"
        made = admin.post(f"{path}/keys", json={"name": "production"})
        assert made.status_code == 201
        key = made.json()["key"]
        listed = admin.get(f"{path}/keys")
        assert [(entry["name"], entry["last_four"], entry["key"]) for entry in listed.json()["data"]] == [
            ("production", key.split("-")[3][-4:], None)
        ]
        assert key not in listed.text
        assert names(gateway, key)[0] == BASE
        assert admin.delete(path).status_code == 204
        assert_problem(admin.get(path), 404, "tenant_not_found")
    with gateway.client(key) as client:
        assert_problem(client.get("/v1/models"), 401, "invalid_api_key")


def test_tenant_name_taken_is_409(gateway: Gateway) -> None:
    with gateway.admin() as admin:
        admin.post("/admin/v1/tenants", json={"name": "twice"})
        assert_problem(admin.post("/admin/v1/tenants", json={"name": "twice"}), 409, "name_taken")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/v1/tenants"),
        ("POST", "/admin/v1/tenants"),
        ("GET", "/admin/v1/tenants/x"),
        ("DELETE", "/admin/v1/tenants/x"),
        ("GET", "/admin/v1/tenants/x/keys"),
        ("POST", "/admin/v1/tenants/x/keys"),
        ("DELETE", "/admin/v1/tenants/x/keys/y"),
        ("GET", "/admin/v1/adapters"),
        ("POST", "/admin/v1/adapters"),
        ("GET", "/admin/v1/adapters/x"),
        ("DELETE", "/admin/v1/adapters/x"),
        ("GET", "/admin/v1/engine"),
        ("GET", "/admin/v1/engine/stats"),
        ("POST", "/admin/v1/engine/reload"),
    ],
)
def test_admin_routes_refuse_a_tenants_key(gateway: Gateway, method: str, path: str) -> None:
    with gateway.client() as client:
        assert_problem(client.request(method, path, json={}), 403, "not_allowed")


def test_adapter_of_one_tenant_is_invisible_to_another(gateway: Gateway) -> None:
    owner, owner_key = gateway.new_tenant("owner")
    source = write_adapter(gateway.adapter_dir / "private", rank=6)
    with gateway.admin() as admin:
        body = {"name": "private", "source": str(source), "tenant_id": owner}
        assert admin.post("/admin/v1/adapters", json=body).status_code == 201
        assert "private" in names(gateway, owner_key)
        assert "private" not in names(gateway)
        chat = {"model": "private", "messages": [{"role": "user", "content": "x"}]}
        with gateway.client() as other:
            assert_problem(other.post("/v1/chat/completions", json=chat), 404, "model_not_found", "model")
        with gateway.client(owner_key) as own:
            assert own.post("/v1/chat/completions", json=chat).status_code == 200
        shown = admin.get("/admin/v1/adapters/private", params={"tenant_id": owner}).json()
        assert (shown["tenant_id"], shown["tier"], shown["card"]["rank"]) == (owner, "device", 6)
        assert_problem(admin.get("/admin/v1/adapters/private"), 404, "adapter_not_found", "name")
        assert admin.delete("/admin/v1/adapters/private", params={"tenant_id": owner}).status_code == 204
        assert "private" not in names(gateway, owner_key)


def test_tenant_deleted_takes_its_adapters_along(gateway: Gateway) -> None:
    tenant, _ = gateway.new_tenant("with adapters")
    source = write_adapter(gateway.adapter_dir / "orphan", rank=9)
    with gateway.admin() as admin:
        resident = gateway.stats().num_adapters_on_device
        body = {"name": "orphan", "source": str(source), "tenant_id": tenant}
        assert admin.post("/admin/v1/adapters", json=body).status_code == 201
        assert admin.delete(f"/admin/v1/tenants/{tenant}").status_code == 204
        assert "orphan" not in [entry["name"] for entry in admin.get("/admin/v1/adapters").json()["data"]]
        assert gateway.stats().num_adapters_on_device == resident


def test_tenant_deleted_while_its_adapter_is_in_use_is_gone_as_a_whole(gateway: Gateway) -> None:
    tenant, key = gateway.new_tenant("busy")
    with gateway.admin() as admin, gateway.client(key) as client:
        for name, rank in (("idle", 10), ("in-use", 11)):
            source = str(write_adapter(gateway.adapter_dir / name, rank=rank))
            body = {"name": name, "source": source, "tenant_id": tenant}
            assert admin.post("/admin/v1/adapters", json=body).status_code == 201
        chat = {"model": "in-use", "stream": True, "messages": [{"role": "user", "content": "<slow>" + "x" * 10}]}
        with client.stream("POST", "/v1/chat/completions", json=chat) as response:
            chunks = response.iter_bytes()
            received = next(chunks)
            assert admin.delete(f"/admin/v1/tenants/{tenant}").status_code == 204
            assert_problem(client.get("/v1/models"), 401, "invalid_api_key")
            assert tenant not in [entry["tenant_id"] for entry in admin.get("/admin/v1/adapters").json()["data"]]
            received += b"".join(chunks)
        assert b'"code":"invalid_api_key"' in received.split(b"\n\n")[-2]


def test_tenant_is_deleted_though_the_engine_is_down(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    tenant, key = gateway.new_tenant("cut off")
    source = str(write_adapter(gateway.adapter_dir / "cut-off", rank=13))

    async def refuse(adapter_id: str) -> None:
        raise EngineUnavailable("the engine is restarting")

    with gateway.admin() as admin, gateway.client(key) as client:
        body = {"name": "cut-off", "source": source, "tenant_id": tenant}
        assert admin.post("/admin/v1/adapters", json=body).status_code == 201
        monkeypatch.setattr(gateway.services.engine, "unload", refuse)
        assert admin.delete(f"/admin/v1/tenants/{tenant}").status_code == 204
        assert_problem(client.get("/v1/models"), 401, "invalid_api_key")


def test_adapter_in_use_is_not_deleted(gateway: Gateway) -> None:
    source = write_adapter(gateway.adapter_dir / "busy", rank=7)
    with gateway.admin() as admin, gateway.client() as client:
        assert admin.post("/admin/v1/adapters", json={"name": "busy", "source": str(source)}).status_code == 201
        chat = {"model": "busy", "stream": True, "messages": [{"role": "user", "content": "<slow>" + "x" * 60}]}
        with client.stream("POST", "/v1/chat/completions", json=chat) as response:
            chunks = response.iter_bytes()  # held: httpx closes the response when its iterator goes
            next(chunks)
            assert_problem(admin.delete("/admin/v1/adapters/busy"), 409, "adapter_in_use")
        while gateway.stats().num_running:
            time.sleep(0.01)
        assert admin.delete("/admin/v1/adapters/busy").status_code == 204


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"name": BASE}, 409, "name_taken", "name"),
        ({"name": "team/echo-one"}, 409, "name_taken", "name"),
        ({"name": ""}, 400, "invalid_request", "name"),
        ({"name": "a@1"}, 400, "invalid_request", "name"),
        ({"name": "x" * 129}, 400, "invalid_request", "name"),
        ({"name": "../up"}, 400, "invalid_request", "name"),
        ({"name": "a/../b"}, 400, "invalid_request", "name"),
        ({"name": "a/./b"}, 400, "invalid_request", "name"),
        ({"name": "a//b"}, 400, "invalid_request", "name"),
        ({"name": "a/"}, 400, "invalid_request", "name"),
        ({"name": "a\n"}, 400, "invalid_request", "name"),
        ({"name": "ä"}, 400, "invalid_request", "name"),
        ({"name": 5}, 400, "invalid_request", "name"),
        ({"name": "upload"}, 400, "invalid_request", "name"),
        ({"name": "validate"}, 400, "invalid_request", "name"),
        ({"name": "a/versions"}, 400, "invalid_request", "name"),
        ({"tenant_id": ["x"]}, 400, "invalid_request", "tenant_id"),
        ({"source": "/" + "x" * 5000}, 400, "adapter_invalid", None),
        ({"source": "/etc/\0"}, 400, "adapter_invalid", None),
        ({"source": "ftp://x/y"}, 403, "adapter_source_forbidden", None),
        ({"base": "other"}, 400, "invalid_request", "base"),
        ({"tenant_id": "tenant_none"}, 404, "tenant_not_found", None),
        ({"source": "/etc"}, 403, "adapter_source_forbidden", None),
        ({"source": "nothing-here"}, 403, "adapter_source_forbidden", None),
        ({"sauce": "x"}, 400, "unknown_parameter", "sauce"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_registration_refused_changes_nothing(
    gateway: Gateway, changes: dict[str, str], status: int, code: str, param: str | None
) -> None:
    body = {"name": "fresh", "source": str(gateway.adapter_dir / "shared"), **changes}
    with gateway.admin() as admin:
        before = admin.get("/admin/v1/adapters").json()
        assert_problem(admin.post("/admin/v1/adapters", json=body), status, code, param)
        assert admin.get("/admin/v1/adapters").json() == before


@pytest.mark.parametrize("name", ["x" * 128, "org/name", "a/b/c", "v1.0:latest", "a/_b", "7", "upload/pin", "versions"])
def test_adapter_name_leads_to_it_on_every_route(gateway: Gateway, name: str) -> None:
    body = {"name": name, "source": str(gateway.adapter_dir / "shared")}
    with gateway.admin() as admin, gateway.client() as client:
        assert admin.post("/admin/v1/adapters", json=body).status_code == 201
        for path in (name, quote(name, safe="")):
            assert admin.get(f"/admin/v1/adapters/{path}").json()["name"] == name
            assert client.get(f"/v1/models/{path}").json()["id"] == name
        chat = {"model": name, "messages": [{"role": "user", "content": "x"}]}
        answer = client.post("/v1/chat/completions", json=chat).json()
        assert answer["choices"][0]["message"]["content"] == f"{name}: x"
        assert admin.delete(f"/admin/v1/adapters/{quote(name, safe='')}").status_code == 204
        assert_problem(admin.delete(f"/admin/v1/adapters/{name}"), 404, "adapter_not_found", "name")
        assert_problem(client.post("/v1/chat/completions", json=chat), 404, "model_not_found", "model")


@pytest.mark.parametrize("broken", ["config", "weights", "both"])
def test_registration_of_broken_files_changes_nothing(gateway: Gateway, broken: str) -> None:
    source = write_adapter(gateway.adapter_dir / f"broken-{broken}")
    if broken in ("config", "both"):
        (source / "adapter_config.json").write_text("{")
    if broken in ("weights", "both"):
        (source / "adapter_model.safetensors").unlink()
    with gateway.admin() as admin:
        before = admin.get("/admin/v1/adapters").json()
        response = admin.post("/admin/v1/adapters", json={"name": "broken", "source": str(source)})
        assert response.status_code in (400, 404)
        assert_problem(response, response.status_code, response.json()["error"]["code"])
        assert response.json()["error"]["code"].startswith("adapter_")
        assert admin.get("/admin/v1/adapters").json() == before


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "name", "invalid_request"),
        ({"name": ""}, "name", "invalid_request"),
        ({"name": "x" * 129}, "name", "invalid_request"),
        ({"name": "a\0b"}, "name", "invalid_request"),
        ({"name": "a\nb"}, "name", "invalid_request"),
        ({"name": None}, "name", "invalid_request"),
        ({"name": "x", "id": "y"}, "id", "unknown_parameter"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_tenant_refused_changes_nothing(gateway: Gateway, body: object, param: str | None, code: str) -> None:
    with gateway.admin() as admin:
        before = admin.get("/admin/v1/tenants").json()
        assert_problem(admin.post("/admin/v1/tenants", json=body), 400, code, param)
        assert admin.get("/admin/v1/tenants").json() == before


@pytest.mark.parametrize(
    ("body", "param"),
    [({"name": 5}, "name"), ({"expires_at": "tomorrow"}, "expires_at"), ({"name": "\0"}, "name")],
    ids=str,
)
def test_key_refused_is_400_and_named(gateway: Gateway, body: object, param: str) -> None:
    with gateway.admin() as admin:
        path = f"/admin/v1/tenants/{gateway.tenant_id}/keys"
        before = admin.get(path).json()
        assert_problem(admin.post(path, json=body), 400, "invalid_request", param)
        assert admin.get(path).json() == before


def test_key_expires_and_is_refused(gateway: Gateway) -> None:
    with gateway.admin() as admin:
        path = f"/admin/v1/tenants/{gateway.tenant_id}/keys"
        past = admin.post(path, json={"expires_at": time.time() - 1}).json()["key"]
        future = admin.post(path, json={"expires_at": time.time() + 3600}).json()["key"]
    with gateway.client(past) as client:
        assert_problem(client.get("/v1/models"), 401, "invalid_api_key")
    with gateway.client(future) as client:
        assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/admin/v1/tenants/none", "tenant_not_found"),
        ("DELETE", "/admin/v1/tenants/none", "tenant_not_found"),
        ("GET", "/admin/v1/tenants/none/keys", "tenant_not_found"),
        ("POST", "/admin/v1/tenants/none/keys", "tenant_not_found"),
        ("DELETE", "/admin/v1/tenants/none/keys/none", "key_not_found"),
    ],
)
def test_tenant_or_key_unknown_is_404(gateway: Gateway, method: str, path: str, code: str) -> None:
    with gateway.admin() as admin:
        assert_problem(admin.request(method, path, json={}), 404, code)


def test_key_of_one_tenant_cannot_be_revoked_through_another(gateway: Gateway) -> None:
    tenant, key = gateway.new_tenant("keeper")
    with gateway.admin() as admin, gateway.client(key) as client:
        key_id = admin.get(f"/admin/v1/tenants/{tenant}/keys").json()["data"][0]["id"]
        refused = admin.delete(f"/admin/v1/tenants/{gateway.tenant_id}/keys/{key_id}")
        assert_problem(refused, 404, "key_not_found")
        assert client.get("/v1/models").status_code == 200


def test_admin_key_lists_as_models_what_it_may_use(gateway: Gateway) -> None:
    tenant, _ = gateway.new_tenant("listed")
    source = str(write_adapter(gateway.adapter_dir / "theirs", rank=14))
    with gateway.admin() as admin:
        body = {"name": "theirs", "source": source, "tenant_id": tenant}
        assert admin.post("/admin/v1/adapters", json=body).status_code == 201
        assert "theirs" in [entry["name"] for entry in admin.get("/admin/v1/adapters").json()["data"]]
        listed = names(gateway, gateway.admin_key)
        assert listed[:2] == [BASE, "team/echo-one"]
        assert "theirs" not in listed
        for name in listed:
            chat = {"model": name, "messages": [{"role": "user", "content": "x"}]}
            assert admin.post("/v1/chat/completions", json=chat).status_code == 200


def test_admin_key_may_chat_and_sees_the_engine(gateway: Gateway) -> None:
    with gateway.admin() as admin:
        chat = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
        assert admin.post("/v1/chat/completions", json=chat).status_code == 200
        engine = admin.get("/admin/v1/engine").json()
        assert (engine["engine"], engine["base_model"], engine["max_model_len"]) == ("echo", BASE, 512)
        assert admin.get("/admin/v1/engine/stats").json()["num_running"] == 0
        assert admin.post("/admin/v1/engine/reload").json() == engine


def test_catalogue_and_keys_survive_a_restart_and_lost_files_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
    source = write_adapter(tmp_path / "local" / "kept")
    chat = {"model": "kept", "messages": [{"role": "user", "content": "x"}]}
    with running(settings_in(tmp_path), "k") as gateway:
        _, key = gateway.new_tenant("t")
        with gateway.admin() as admin:
            assert admin.post("/admin/v1/adapters", json={"name": "kept", "source": str(source)}).status_code == 201
    (tmp_path / "cache").rename(tmp_path / "cache-that-is-gone")
    with running(settings_in(tmp_path), "k") as gateway:
        assert names(gateway, key) == [BASE, "kept"]
        with gateway.client(key) as client:
            answer = client.post("/v1/chat/completions", json=chat)
            assert answer.json()["choices"][0]["message"]["content"] == "kept: x"
    assert (tmp_path / "cache").is_dir()
