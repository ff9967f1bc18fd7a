"""Admin keys, tenants' secrets and the audit log over REST, and keys that are revoked while requests run."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.gateway import BASE, Gateway, running, settings_in
from support.problems import assert_problem


def chat(text: str, **fields: object) -> dict[str, object]:
    return {"model": BASE, "messages": [{"role": "user", "content": text}], **fields}


def audit(gateway: Gateway, **query: str | int) -> list[dict[str, Any]]:
    with gateway.admin() as admin:
        answer = admin.get("/admin/v1/audit", params=query)
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["data"]
        return found


@pytest.fixture
def tenant(gateway: Gateway) -> tuple[str, str]:
    """(id, an inference key)"""
    return gateway.new_tenant(f"access-{uuid.uuid4().hex[:12]}")


def tenant_admin(gateway: Gateway, tenant_id: str) -> httpx.Client:
    with gateway.admin() as admin:
        made = admin.post(f"/admin/v1/tenants/{tenant_id}/keys", json={"role": "tenant-admin"})
        return gateway.client(made.json()["key"])


def test_admin_keys_are_made_listed_and_revoked(gateway: Gateway) -> None:
    with gateway.admin() as admin:
        made = admin.post("/admin/v1/admin-keys", json={"name": "night shift"})
        assert made.status_code == 201
        key_id, key = made.json()["id"], made.json()["key"]
        listed = admin.get("/admin/v1/admin-keys")
        assert key_id in [entry["id"] for entry in listed.json()["data"]]
        assert key not in listed.text
        with gateway.client(key) as other:
            assert other.get("/admin/v1/tenants").status_code == 200
            assert admin.delete(f"/admin/v1/admin-keys/{key_id}").status_code == 204
            assert_problem(other.get("/admin/v1/tenants"), 401, "invalid_api_key")
        assert_problem(admin.delete("/admin/v1/admin-keys/none"), 404, "key_not_found")
        assert_problem(admin.post("/admin/v1/admin-keys", json={}), 400, "invalid_request", "name")


def test_last_admin_key_is_not_revoked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAPLEX_TEST_ADMIN_KEY", raising=False)
    with running(settings_in(tmp_path), "") as gateway:
        key = gateway.services.new_admin_key
        assert key is not None
        with gateway.client(key) as admin:
            key_id = admin.get("/admin/v1/admin-keys").json()["data"][0]["id"]
            assert_problem(admin.delete(f"/admin/v1/admin-keys/{key_id}"), 409, "last_admin_key")
            assert admin.get("/admin/v1/tenants").status_code == 200


def test_secret_is_never_shown_and_belongs_to_its_tenant(gateway: Gateway, tenant: tuple[str, str]) -> None:
    path = f"/admin/v1/tenants/{tenant[0]}/secrets"
    with tenant_admin(gateway, tenant[0]) as own, gateway.admin() as admin:
        put = own.put(f"{path}/hub_token", json={"value": "hf_deep-secret"})
        assert put.status_code == 200
        assert set(put.json()) == {"name", "created_at", "updated_at"}
        for client in (own, admin):
            listed = client.get(path)
            assert [secret["name"] for secret in listed.json()["data"]] == ["hub_token"]
            assert "deep-secret" not in listed.text
        assert own.delete(f"{path}/hub_token").status_code == 204
        assert_problem(own.delete(f"{path}/hub_token"), 404, "secret_not_found")
        for name in ("HF", "1x", "a-b", "x" * 65, "%00", "hf_token"):
            refused = own.put(f"{path}/{name}", json={"value": "v"})
            assert_problem(refused, 400, "invalid_request", "name")
            assert "hub_token, s3_token, https_token" in refused.json()["error"]["message"]
        for value in ("", "x" * 8193, 5, None):
            assert_problem(own.put(f"{path}/hub_token", json={"value": value}), 400, "invalid_request", "value")
    assert "deep-secret" not in str(audit(gateway, tenant_id=tenant[0]))


def test_every_admin_action_is_written_down_with_its_outcome(gateway: Gateway) -> None:
    name = f"audited-{uuid.uuid4().hex[:8]}"
    with gateway.admin() as admin:
        tenant = admin.post("/admin/v1/tenants", json={"name": name, "limits": {"max_tokens": 7}}).json()["id"]
        made = admin.post(f"/admin/v1/tenants/{tenant}/keys", json={"role": "tenant-admin"}).json()
        assert_problem(
            admin.put(f"/admin/v1/tenants/{tenant}/limits", json={"weight": 0}), 400, "invalid_request", "weight"
        )
        with gateway.client(made["key"]) as own:
            limits = {"requests_per_minute": 5, "allowed_models": ["a*"]}
            own.put(f"/admin/v1/tenants/{tenant}/keys/{made['id']}/limits", json=limits)
            own.get(f"/admin/v1/tenants/{tenant}")  # reading is no action
            assert_problem(own.delete(f"/admin/v1/tenants/{tenant}/keys/none"), 404, "key_not_found")
            shown = own.get(f"/admin/v1/tenants/{tenant}/audit").json()["data"]
        admin.delete(f"/admin/v1/tenants/{tenant}")
    found = audit(gateway, tenant_id=tenant)
    assert found[1:] == shown
    assert [
        (row["action"], row["key_id"], row["object"], row["outcome"], row["status"]) for row in reversed(found)
    ] == [
        ("create_tenant", "admin", f"tenants/{tenant}", "ok", 201),
        ("create_key", "admin", f"tenants/{tenant}/keys/{made['id']}", "ok", 201),
        ("set_limits", "admin", f"tenants/{tenant}/limits", "invalid_request", 400),
        ("set_key_limits", made["id"], f"tenants/{tenant}/keys/{made['id']}/limits", "ok", 200),
        ("revoke_key", made["id"], f"tenants/{tenant}/keys/none", "key_not_found", 404),
        ("delete_tenant", "admin", f"tenants/{tenant}", "ok", 204),
    ]
    assert [row["details"] for row in reversed(found)][:4] == [
        {"name": name, "limits": {"max_tokens": 7}},
        {"role": "tenant-admin", "last_four": made["last_four"]},
        {},
        {"limits": limits},
    ]
    assert all(row["address"] == "127.0.0.1" and row["request_id"] and row["ended_at"] >= row["at"] for row in found)
    assert made["key"] not in str(found)


def test_tenants_audit_shows_what_its_own_admin_did_with_adapters_and_routes(gateway: Gateway) -> None:
    name = f"managed-{uuid.uuid4().hex[:8]}"
    tenant, _ = gateway.new_tenant(name)
    source = str(gateway.adapter_dir / "shared")
    targets = [{"model": "team/echo-one", "weight": 2.0}]
    adapter, address = {"name": name, "source": source}, f"file://{gateway.adapter_dir}/*"
    with tenant_admin(gateway, tenant) as own, gateway.admin() as admin:
        assert_problem(own.post("/admin/v1/adapters", json=adapter), 403, "adapter_source_forbidden")
        admin.put(f"/admin/v1/tenants/{tenant}/limits", json={"request_adapters": [address]})
        assert own.post("/admin/v1/adapters", json=adapter).status_code == 201
        assert own.post("/admin/v1/adapters/validate", json={"source": source}).status_code == 200
        assert own.post("/admin/v1/routes", json={"name": "way", "targets": targets}).status_code == 201
        assert own.put("/admin/v1/routes/way", json={"targets": [{**targets[0], "weight": 3}]}).status_code == 200
        assert own.delete("/admin/v1/routes/way").status_code == 204
        assert own.post(f"/admin/v1/adapters/{name}/warm").status_code == 200
        shown = own.get(f"/admin/v1/tenants/{tenant}/audit").json()["data"]
    told = [(row["action"], row["object"], row["outcome"], row["details"]) for row in reversed(shown)]
    assert [one for one in told if one[0] not in ("create_key", "create_tenant", "set_limits")] == [
        ("register_adapter", f"adapters/{name}", "adapter_source_forbidden", {"source": source}),
        ("register_adapter", f"adapters/{name}", "ok", {"source": source}),
        ("validate_adapter", "adapters/validate", "ok", {"source": source}),
        ("create_route", "routes/way", "ok", {"targets": targets}),
        ("change_route", "routes/way", "ok", {"targets": [{**targets[0], "weight": 3.0}]}),
        ("delete_route", "routes/way", "ok", {}),
        ("act_on_adapter", f"adapters/{name}/warm", "ok", {}),
    ]


def test_audit_is_filtered_and_paged(gateway: Gateway, tenant: tuple[str, str]) -> None:
    with gateway.admin() as admin:
        for number in range(5):
            admin.post(f"/admin/v1/tenants/{tenant[0]}/keys", json={"name": f"k{number}"})
        query: dict[str, Any] = {"tenant_id": tenant[0], "action": "create_key", "limit": 4}
        first = admin.get("/admin/v1/audit", params=query).json()
        rest = admin.get("/admin/v1/audit", params={**query, "after": first["last_id"]}).json()
        assert (len(first["data"]), first["has_more"]) == (4, True)
        assert (len(rest["data"]), rest["has_more"]) == (2, False)
        names = [row["details"].get("name", "default") for row in first["data"] + rest["data"]]
        assert names == ["k4", "k3", "k2", "k1", "k0", "default"]
        for wrong, param in (
            ("limit=0", "limit"),
            ("limit=x", "limit"),
            ("since=soon", "since"),
            ("key_id=%00", "key_id"),
        ):
            assert_problem(admin.get(f"/admin/v1/audit?{wrong}"), 400, "invalid_request", param)
        assert_problem(admin.get("/admin/v1/audit?colour=red"), 400, "unknown_parameter", "colour")
        assert_problem(admin.get("/admin/v1/audit?limit=1&limit=2"), 400, "invalid_request", "limit")


def test_action_that_cannot_be_written_down_does_not_happen(
    gateway: Gateway, tenant: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(entry: object) -> int:
        raise OSError("the disk is full")

    with gateway.admin() as admin:
        monkeypatch.setattr(gateway.services.audit, "begin", refuse)
        assert_problem(admin.delete(f"/admin/v1/tenants/{tenant[0]}"), 500, "internal_error")
        assert admin.get(f"/admin/v1/tenants/{tenant[0]}").status_code == 200


def test_refused_callers_leave_no_rows(gateway: Gateway, tenant: tuple[str, str]) -> None:
    before = audit(gateway, limit=1)[0]["id"]
    with gateway.client(tenant[1]) as client:
        for _ in range(3):
            assert_problem(client.post("/admin/v1/tenants", json={"name": "mine"}), 403, "not_allowed")
    with gateway.client("nonsense") as client:
        assert_problem(client.post("/admin/v1/tenants", json={"name": "mine"}), 401, "invalid_api_key")
    assert audit(gateway, limit=1)[0]["id"] == before


def revoke(gateway: Gateway, tenant_id: str) -> None:
    with gateway.admin() as admin:
        for key in admin.get(f"/admin/v1/tenants/{tenant_id}/keys").json()["data"]:
            assert admin.delete(f"/admin/v1/tenants/{tenant_id}/keys/{key['id']}").status_code == 204


def test_stream_of_a_revoked_key_ends_at_once_with_the_reason(gateway: Gateway, tenant: tuple[str, str]) -> None:
    with gateway.client(tenant[1]) as client, gateway.client() as neighbour:
        body = chat("<slow>" + "x" * 200, stream=True)
        with (
            client.stream("POST", "/v1/chat/completions", json=body) as answer,
            neighbour.stream("POST", "/v1/chat/completions", json=chat("<slow>" + "y" * 20, stream=True)) as other,
        ):
            chunks = answer.iter_bytes()
            received = next(chunks)
            revoke(gateway, tenant[0])
            received += b"".join(chunks)
            assert other.read().endswith(b"data: [DONE]\n\n")
        frames = received.split(b"\n\n")
        assert b'"code":"invalid_api_key"' in frames[-2]
        assert received.count(b"x") < 200
        assert b"[DONE]" not in received


def test_whole_answer_of_a_revoked_key_is_401_and_gives_its_slot_back(
    gateway: Gateway, tenant: tuple[str, str]
) -> None:
    answers: list[httpx.Response] = []

    def ask() -> None:
        with gateway.client(tenant[1]) as client:
            answers.append(client.post("/v1/chat/completions", json=chat("<slow>" + "x" * 200, n=2)))

    with gateway.admin() as admin:
        admin.put(f"/admin/v1/tenants/{tenant[0]}/limits", json={"concurrent_requests": 1})
        thread = threading.Thread(target=ask)
        thread.start()
        while not gateway.stats().num_running:
            time.sleep(0.01)
        revoke(gateway, tenant[0])
        thread.join(20)
        assert_problem(answers[0], 401, "invalid_api_key")
        key = admin.post(f"/admin/v1/tenants/{tenant[0]}/keys", json={}).json()["key"]
    with gateway.client(key) as client:
        assert client.post("/v1/chat/completions", json=chat("x")).status_code == 200


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Gateway, Gateway]]:
    """Two gateways on one database."""
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
    with running(settings_in(tmp_path), "k") as one, running(settings_in(tmp_path), "k") as other:
        yield one, other


def test_key_revoked_in_one_gateway_ends_its_streams_in_the_other(two: tuple[Gateway, Gateway]) -> None:
    one, other = two
    tenant_id, key = one.new_tenant("acme")
    with other.client(key) as client:
        body = chat("<slow>" + "x" * 300, stream=True)
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            chunks = answer.iter_bytes()
            received = next(chunks)
            revoke(one, tenant_id)
            received += b"".join(chunks)
        assert b'"code":"invalid_api_key"' in received.split(b"\n\n")[-2]
        assert_problem(client.get("/v1/models"), 401, "invalid_api_key")


def test_no_secret_and_no_key_is_in_a_sessions_log(
    gateway: Gateway, tenant: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    path = f"/admin/v1/tenants/{tenant[0]}"
    with caplog.at_level(logging.DEBUG), gateway.admin() as admin:
        shown = [admin.post("/admin/v1/admin-keys", json={"name": "logged?"}).json()["key"]]
        made = admin.post(f"{path}/keys", json={}).json()
        shown += [made["key"], admin.post(f"{path}/keys/{made['id']}/rotate", json={}).json()["key"]]
        admin.put(f"{path}/secrets/hub_token", json={"value": "hf_deep-secret"})
        admin.put(f"{path}/secrets/hub_token", json={"value": ["hf_deep-secret"]})  # refused
        with gateway.client(made["key"] + "x") as mistyped, gateway.client(made["key"]) as client:
            mistyped.post("/v1/chat/completions", json=chat("x"))
            client.post("/v1/chat/completions", json=chat("<fail> with a prompt of its own"))
    server_side = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    told = " ".join(f"{record.getMessage()} {record.args} {record.exc_text}" for record in server_side)
    assert "this request was asked to fail" in told
    for secret in (*shown, tenant[1], gateway.admin_key, "deep-secret", "Bearer", "prompt of its own"):
        assert secret not in told
