"""Adapters over the admin API: versions, states, tiers, routes, and what a tenant's own key may do with them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import pytest
from support.adapter_files import WEIGHTS_NAME, adapter_files, write_files
from support.gateway import BASE, Gateway, running, settings_in, write_adapter
from support.hostile_adapters import spoilt
from support.problems import assert_problem

from loraplex.config.settings import Settings


def said(client: httpx.Client, model: str, text: str = "x", **more: Any) -> str:
    chat = {"model": model, "messages": [{"role": "user", "content": text}], **more}
    answer = client.post("/v1/chat/completions", json=chat)
    assert answer.status_code == 200, answer.text
    content: str = answer.json()["choices"][0]["message"]["content"]
    return content


@pytest.fixture
def admin(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.admin() as client:
        yield client


def new_adapter(gateway: Gateway, name: str, rank: int, **more: Any) -> str:
    """Written and registered; its source."""
    source = str(write_adapter(gateway.adapter_dir / f"{name}-{rank}", rank=rank))
    with gateway.admin() as admin:
        made = admin.post("/admin/v1/adapters", json={"name": name, "source": source, **more})
        assert made.status_code == 201, made.text
    return source


def manager(gateway: Gateway, name: str) -> tuple[str, httpx.Client]:
    """(id of a new tenant, client with a key that manages it)"""
    tenant, _ = gateway.new_tenant(name)
    with gateway.admin() as admin:
        key = admin.post(f"/admin/v1/tenants/{tenant}/keys", json={"role": "tenant-admin"}).json()["key"]
    return tenant, gateway.client(key)


def test_list_goes_through_pages_oldest_first(gateway: Gateway, admin: httpx.Client) -> None:
    tenant, own = manager(gateway, "pages")
    for number in range(5):
        new_adapter(gateway, "page/same" if number == 1 else f"page/{number}", 60 + number, tenant_id=tenant)
    new_adapter(gateway, "page/same", 65)
    with own:
        for client, query in ((own, {}), (admin, {"tenant_id": tenant}), (admin, {})):
            whole = client.get("/admin/v1/adapters", params=query).json()
            pages: list[Any] = []
            after: dict[str, str] = {}
            while not pages or pages[-1]["has_more"]:
                page = client.get("/admin/v1/adapters", params={**query, **after, "limit": 2})
                assert page.status_code == 200, page.text
                pages.append(page.json())
                after = {"after": pages[-1]["last_id"]}
            assert [one for page in pages for one in page["data"]] == whole["data"]
            assert {len(page["data"]) for page in pages[:-1]} == {2}
            assert (whole["has_more"], whole["last_id"]) == (False, pages[-1]["last_id"])
            assert client.get("/admin/v1/adapters", params={**query, **after}).json()["data"] == []
        assert_problem(own.get("/admin/v1/adapters?after=/page/same"), 404, "adapter_not_found", "after")


@pytest.mark.parametrize(
    ("query", "status", "code", "param"),
    [
        ("offset=1", 400, "unknown_parameter", "offset"),
        ("limit=0", 400, "invalid_request", "limit"),
        ("limit=x", 400, "invalid_request", "limit"),
        ("limit=1001", 400, "invalid_request", "limit"),
        ("limit=1&limit=2", 400, "invalid_request", "limit"),
        ("after=nothing", 404, "adapter_not_found", "after"),
        ("after=/nothing", 404, "adapter_not_found", "after"),
    ],
)
def test_list_that_asks_for_what_is_not_there_is_refused_by_name(
    admin: httpx.Client, query: str, status: int, code: str, param: str
) -> None:
    assert_problem(admin.get(f"/admin/v1/adapters?{query}"), status, code, param)


def test_update_serves_new_requests_while_a_stream_finishes_on_the_old_version(
    gateway: Gateway, admin: httpx.Client
) -> None:
    new_adapter(gateway, "versioned", 20)
    second = str(write_adapter(gateway.adapter_dir / "versioned-21", rank=21))
    chat = {"model": "versioned", "stream": True, "messages": [{"role": "user", "content": "<slow>" + "x" * 20}]}
    with gateway.client() as client, client.stream("POST", "/v1/chat/completions", json=chat) as stream:
        chunks = stream.iter_bytes()
        received = next(chunks)
        changed = admin.patch("/admin/v1/adapters/versioned", json={"source": second}).json()
        assert (changed["version"], changed["card"]["rank"], changed["state"]) == (2, 21, "ready")
        residents = {found.adapter_id: found.num_requests for found in _residency(gateway)}
        assert residents[changed["versions"][0]["adapter_id"]] == 1
        assert said(client, "versioned") == "versioned: x"
        received += b"".join(chunks)
    assert received.endswith(b"data: [DONE]\n\n")
    listed = admin.get("/admin/v1/adapters/versioned/versions").json()["data"]
    assert [(one["version"], one["is_current"], one["card"]["rank"]) for one in listed] == [
        (1, False, 20),
        (2, True, 21),
    ]
    back = admin.post("/admin/v1/adapters/versioned/rollback").json()
    assert (back["version"], back["card"]["rank"]) == (1, 20)
    forth = admin.post("/admin/v1/adapters/versioned/rollback", json={"version": listed[1]["adapter_id"][:12]}).json()
    assert forth["version"] == 2
    with gateway.client() as client:
        for model in ("versioned@1", f"versioned@{listed[0]['adapter_id']}"):
            assert said(client, model) == "versioned: x"
    assert_problem(
        admin.post("/admin/v1/adapters/versioned/rollback", json={"version": 9}), 400, "invalid_request", "version"
    )


def test_registration_without_waiting_is_accepted_and_explains_its_failure(
    gateway: Gateway, admin: httpx.Client
) -> None:
    source = gateway.adapter_dir / "later"
    body = {"name": "later", "source": str(source), "wait": False}
    made = admin.post("/admin/v1/adapters", json=body)
    assert (made.status_code, made.json()["state"] in ("registered", "fetching")) == (202, True)
    shown = _once(admin, "later", "failed")
    assert "there is no such directory" in shown["reason"]
    chat = {"model": "later", "messages": [{"role": "user", "content": "x"}]}
    with gateway.client() as client:
        assert_problem(client.post("/v1/chat/completions", json=chat), 424, "adapter_failed", "model")
        write_adapter(source, rank=22)
        assert admin.post("/admin/v1/adapters/later/retry").status_code == 202
        assert _once(admin, "later", "ready")["reason"] is None
        assert said(client, "later") == "later: x"
    assert_problem(admin.post("/admin/v1/adapters/later/retry"), 400, "invalid_request", "version")


def test_tiers_pins_and_uses_are_told(gateway: Gateway, admin: httpx.Client) -> None:
    new_adapter(gateway, "moved", 23)
    path = "/admin/v1/adapters/moved"
    before = admin.get(path).json()
    assert (before["tier"], before["pinned"], before["last_used_at"]) == ("disk", False, None)
    assert admin.post(f"{path}/warm").json()["tier"] == "device"
    assert admin.post(f"{path}/pin").json()["pinned"] is True
    assert admin.post(f"{path}/evict").json()["tier"] == "disk"
    assert admin.post(f"{path}/unpin").json()["pinned"] is False
    assert admin.patch(path, json={"pinned": True}).json()["pinned"] is True
    began = time.time()
    with gateway.client() as client:
        said(client, "moved")
    assert began - 1 < admin.get(path).json()["last_used_at"] < time.time() + 1
    assert_problem(admin.post(f"{path}/explode"), 404, "adapter_not_found", "name")
    assert_problem(admin.patch(path, json={}), 400, "invalid_request", "source")


def test_validation_tells_what_registering_would_and_registers_nothing(gateway: Gateway, admin: httpx.Client) -> None:
    source = write_adapter(gateway.adapter_dir / "examined", rank=24)
    before = admin.get("/admin/v1/adapters").json()
    found = admin.post("/admin/v1/adapters/validate", json={"source": str(source)}).json()
    assert (found["state"], found["card"]["rank"], len(found["adapter_id"])) == ("ready", 24, 64)
    (source / "adapter_config.json").write_text("{}")
    assert_problem(admin.post("/admin/v1/adapters/validate", json={"source": str(source)}), 400, "adapter_invalid")
    assert admin.get("/admin/v1/adapters").json() == before


def test_weights_that_are_not_finite_are_refused_wherever_they_come_from(gateway: Gateway, admin: httpx.Client) -> None:
    files = adapter_files() | {WEIGHTS_NAME: spoilt(math.nan, "float32")}
    source = str(write_files(gateway.adapter_dir / "not-finite", files))
    before, residents = admin.get("/admin/v1/adapters").json(), _residency(gateway)
    parts = [("file", (name, content)) for name, content in files.items()]
    for refused in (
        admin.post("/admin/v1/adapters", json={"name": "not-finite", "source": source}),
        admin.post("/admin/v1/adapters/validate", json={"source": source}),
        admin.post("/admin/v1/adapters/upload", params={"name": "not-finite"}, files=parts),
    ):
        assert_problem(refused, 400, "adapter_invalid")
        assert "tensor 'b' has a NaN or an infinity at [1, 2]" in refused.json()["error"]["message"]
    assert admin.get("/admin/v1/adapters").json() == before
    assert _residency(gateway) == residents


def test_deletion_that_drains_lets_streams_finish(gateway: Gateway, admin: httpx.Client) -> None:
    new_adapter(gateway, "drained", 25)
    content = admin.get("/admin/v1/adapters/drained").json()["adapter_id"]
    chat = {"model": "drained", "stream": True, "messages": [{"role": "user", "content": "<slow>" + "x" * 20}]}
    with gateway.client() as client, client.stream("POST", "/v1/chat/completions", json=chat) as stream:
        chunks = stream.iter_bytes()
        received = next(chunks)
        assert_problem(admin.delete("/admin/v1/adapters/drained"), 409, "adapter_in_use")
        assert_problem(admin.delete("/admin/v1/adapters/drained?drain=maybe"), 400, "invalid_request", "drain")
        assert admin.delete("/admin/v1/adapters/drained?drain=true").status_code == 204
        assert_problem(client.post("/v1/chat/completions", json=chat), 404, "model_not_found", "model")
        received += b"".join(chunks)
    assert received.endswith(b"data: [DONE]\n\n")
    while content in [found.adapter_id for found in _residency(gateway)]:
        time.sleep(0.02)


def test_weighted_route_is_served_listed_and_changed(gateway: Gateway, admin: httpx.Client) -> None:
    new_adapter(gateway, "left", 26)
    new_adapter(gateway, "right", 27)
    targets = [{"model": "left", "weight": 90}, {"model": "right", "weight": 10}]
    made = admin.post("/admin/v1/routes", json={"name": "both-ways", "targets": targets})
    assert made.status_code == 201, made.text
    assert [route["name"] for route in admin.get("/admin/v1/routes").json()["data"]] == ["both-ways"]
    assert "both-ways" not in [entry["name"] for entry in admin.get("/admin/v1/adapters").json()["data"]]
    with gateway.client() as client:
        assert "both-ways" in [model["id"] for model in client.get("/v1/models").json()["data"]]
        answers = [said(client, "both-ways", user=f"user-{number}") for number in range(60)]
        assert set(answers) == {"left: x", "right: x"}
        assert answers == [said(client, "both-ways", user=f"user-{number}") for number in range(60)]
        only = {"targets": [{"model": "right@1", "weight": 1}]}
        assert admin.put("/admin/v1/routes/both-ways", json=only).json()["targets"] == only["targets"]
        assert said(client, "both-ways", user="user-1") == "right: x"
    assert_problem(admin.delete("/admin/v1/adapters/right"), 409, "adapter_in_use")
    assert_problem(admin.get("/admin/v1/adapters/both-ways"), 404, "adapter_not_found", "name")
    assert_problem(admin.post("/admin/v1/adapters/both-ways/pin"), 404, "adapter_not_found", "name")
    bad = {"targets": [{"model": "left", "weight": 0}]}
    assert_problem(admin.put("/admin/v1/routes/both-ways", json=bad), 400, "invalid_request", "targets[0].weight")
    assert admin.delete("/admin/v1/routes/both-ways").status_code == 204
    assert_problem(admin.get("/admin/v1/routes/both-ways"), 404, "adapter_not_found", "name")


def test_tenants_key_manages_its_own_adapters_and_sees_no_other(gateway: Gateway, admin: httpx.Client) -> None:
    tenant, own = manager(gateway, "manager")
    other, _ = gateway.new_tenant("managed by another")
    new_adapter(gateway, "mine", 28, tenant_id=tenant)
    new_adapter(gateway, "theirs", 29, tenant_id=other)
    with own:
        assert [entry["name"] for entry in own.get("/admin/v1/adapters").json()["data"]] == ["mine"]
        assert own.get("/admin/v1/adapters/mine").json()["tenant_id"] == tenant
        assert own.post("/admin/v1/adapters/mine/pin").status_code == 200
        for name in ("theirs", "team/echo-one"):  # another tenant's, and a shared one
            for method, path in (("GET", name), ("DELETE", name), ("PATCH", name), ("POST", f"{name}/evict")):
                body = {"pinned": True} if method == "PATCH" else None
                refused = own.request(method, f"/admin/v1/adapters/{path}", json=body)
                assert_problem(refused, 404, "adapter_not_found", "name")
        assert_problem(own.get("/admin/v1/adapters/theirs", params={"tenant_id": other}), 404, "tenant_not_found")
        local = {"name": "sneaky", "source": str(gateway.adapter_dir / "theirs-29")}
        assert_problem(own.post("/admin/v1/adapters", json=local), 403, "adapter_source_forbidden")
        assert_problem(
            own.post("/admin/v1/adapters/validate", json={"source": local["source"]}), 403, "adapter_source_forbidden"
        )
        assert_problem(
            own.patch("/admin/v1/adapters/mine", json={"source": local["source"]}), 403, "adapter_source_forbidden"
        )
        assert_problem(own.post("/admin/v1/adapters", json={**local, "tenant_id": other}), 404, "tenant_not_found")
        limits = {"request_adapters": [f"file://{gateway.adapter_dir}/theirs*"]}
        assert admin.put(f"/admin/v1/tenants/{tenant}/limits", json=limits).status_code == 200
        assert own.post("/admin/v1/adapters", json=local).status_code == 201
        share = {"name": "route", "targets": [{"model": "sneaky", "weight": 1}]}
        assert own.post("/admin/v1/routes", json=share).json()["tenant_id"] == tenant
        foreign = {"name": "foreign", "targets": [{"model": "theirs", "weight": 1}]}
        assert_problem(own.post("/admin/v1/routes", json=foreign), 400, "invalid_request", "targets[0].model")
    assert [route["name"] for route in admin.get("/admin/v1/routes", params={"tenant_id": other}).json()["data"]] == []


@contextmanager
def same_content(gateway: Gateway, rank: int) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Two tenants' managers: the one has an adapter `mine`, the other `theirs`, of one and the same content."""
    source = str(write_adapter(gateway.adapter_dir / f"same-{rank}", rank=rank))
    (first, mine), (second, theirs) = (manager(gateway, f"{who} of the same {rank}") for who in ("one", "other"))
    with mine, theirs, gateway.admin() as admin:
        for name, tenant in (("mine", first), ("theirs", second)):
            made = admin.post("/admin/v1/adapters", json={"name": name, "source": source, "tenant_id": tenant})
            assert made.status_code == 201, made.text
        yield mine, theirs


def is_pinned(gateway: Gateway, client: httpx.Client, name: str) -> bool:
    """By the engine, whatever the catalogue says."""
    content = client.get(f"/admin/v1/adapters/{name}").json()["adapter_id"]
    return content in [found.adapter_id for found in _residency(gateway) if found.pinned]


def test_pin_lasts_whatever_happens_to_another_tenants_adapter_of_the_same_content(gateway: Gateway) -> None:
    with same_content(gateway, 30) as (mine, theirs):
        assert theirs.post("/admin/v1/adapters/theirs/pin").json()["pinned"] is True
        for verb in ("unpin", "evict", "pin", "evict", "unpin"):
            shown = mine.post(f"/admin/v1/adapters/mine/{verb}").json()
            assert (shown["name"], shown["pinned"]) == ("mine", verb == "pin" or (verb == "evict" and shown["pinned"]))
            assert is_pinned(gateway, theirs, "theirs"), verb
        assert mine.post("/admin/v1/adapters/mine/pin").json()["pinned"] is True
        assert mine.delete("/admin/v1/adapters/mine").status_code == 204
        assert is_pinned(gateway, theirs, "theirs")
        assert theirs.post("/admin/v1/adapters/theirs/unpin").json()["pinned"] is False
        assert not is_pinned(gateway, theirs, "theirs")


def test_last_pin_of_a_content_goes_with_the_adapter_that_had_it(gateway: Gateway) -> None:
    with same_content(gateway, 31) as (mine, theirs):
        assert mine.post("/admin/v1/adapters/mine/pin").status_code == 200
        assert is_pinned(gateway, theirs, "theirs")
        assert theirs.get("/admin/v1/adapters/theirs").json()["pinned"] is False
        assert mine.delete("/admin/v1/adapters/mine").status_code == 204
        assert not is_pinned(gateway, theirs, "theirs")


@pytest.mark.parametrize("path", ["DELETE /admin/v1/adapters/", "DELETE /v1/models/", "POST /v1/unload_lora_adapter"])
def test_requests_of_another_tenant_for_the_same_content_make_no_difference(gateway: Gateway, path: str) -> None:
    """Nor does it that there is such a tenant: whoever uses its own adapter is told so."""

    def delete(client: httpx.Client, name: str) -> httpx.Response:
        method, _, url = path.partition(" ")
        if method == "POST":
            return client.post(url, json={"lora_name": name})
        return client.delete(url + name)

    chat = {"model": "theirs", "stream": True, "messages": [{"role": "user", "content": "<slow>" + "x" * 20}]}
    with same_content(gateway, 32 + len(path)) as (mine, theirs):
        with theirs.stream("POST", "/v1/chat/completions", json=chat) as stream:
            chunks = stream.iter_bytes()
            received = next(chunks)
            assert mine.get("/admin/v1/adapters/mine").json()["num_requests"] == 0
            assert theirs.get("/admin/v1/adapters/theirs").json()["num_requests"] == 1
            assert mine.post("/admin/v1/adapters/mine/evict").status_code == 200
            refused = [theirs.post("/admin/v1/adapters/theirs/evict"), delete(theirs, "theirs")]
            assert [answer.status_code for answer in refused] == [409, 409]
            assert all("1 requests use the adapter" in answer.text for answer in refused)
            assert delete(mine, "mine").is_success
            received += b"".join(chunks)
        assert received.endswith(b"data: [DONE]\n\n")
        assert delete(theirs, "theirs").is_success


def test_refused_source_is_told_as_it_was_sent(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where it leads on the server, nor whether there is anything."""
    monkeypatch.chdir(gateway.adapter_dir)
    _, own = manager(gateway, "guesser")
    with own:
        for source in ("shared", "nothing-here"):
            for path, name in (("adapters", {"name": "guess"}), ("adapters/validate", {})):
                refused = own.post(f"/admin/v1/{path}", json={"source": source, **name})
                told = assert_problem(refused, 403, "adapter_source_forbidden")
                assert told == f"{source}: this tenant may not register adapters from here"


def test_inference_key_manages_nothing(gateway: Gateway) -> None:
    with gateway.client() as client:
        for method, path in (("GET", "adapters"), ("POST", "adapters"), ("GET", "routes"), ("DELETE", "adapters/left")):
            assert_problem(client.request(method, f"/admin/v1/{path}"), 403, "not_allowed")


def test_pins_and_versions_are_as_they_were_after_a_restart(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
    sources = [str(write_adapter(tmp_path / "local" / name, rank)) for name, rank in (("a", 4), ("b", 5))]
    with running(settings_in(tmp_path), "k") as gateway, gateway.admin() as admin:
        body = {"name": "kept", "source": sources[0], "pinned": True}
        assert admin.post("/admin/v1/adapters", json=body).json()["pinned"] is True
        assert admin.patch("/admin/v1/adapters/kept", json={"source": sources[1]}).status_code == 200
        pinned = [found.adapter_id for found in _residency(gateway) if found.pinned]
        before = admin.get("/admin/v1/adapters/kept").json()
        assert pinned == [before["adapter_id"]]
        route = {"name": "route", "targets": [{"model": "kept@1", "weight": 2}]}
        assert admin.post("/admin/v1/routes", json=route).status_code == 201
        routes = admin.get("/admin/v1/routes").json()
    with running(settings_in(tmp_path), "k") as gateway, gateway.admin() as admin:
        while not [found for found in _residency(gateway) if found.pinned]:
            time.sleep(0.05)
        assert admin.get("/admin/v1/adapters/kept").json() == before
        assert admin.get("/admin/v1/routes").json() == routes
        assert said(admin, "route") == "kept: x"


def test_base_of_another_name_is_noted_or_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
    made_for = {"ours": f"org/{BASE.upper()}", "alias": "org/Alias-8B", "none": "", "other": "org/other"}
    for name, base in made_for.items():
        directory = write_adapter(tmp_path / "local" / name)
        config = f'{{"peft_type": "LORA", "r": 4, "base_model_name_or_path": "{base}"}}'
        (directory / "adapter_config.json").write_text(config)
    for action, status in (("warn", 201), ("refuse", 400)):
        with (
            running(_with_base(settings_in(tmp_path / action), tmp_path, action), "k") as gateway,
            gateway.admin() as admin,
        ):
            for name in made_for:
                body = {"name": name, "source": str(tmp_path / "local" / name)}
                made = admin.post("/admin/v1/adapters", json=body)
                assert made.status_code == (status if name == "other" else 201), made.text
                if name == "other" and action == "refuse":
                    assert_problem(made, 400, "adapter_mismatch")
                else:
                    assert bool(made.json()["notes"]) == (name == "other")


def _with_base(settings: Settings, home: Any, action: Any) -> Settings:

    adapters = msgspec.structs.replace(
        settings.adapters, local_roots=(str(home / "local"),), base_names=("alias-8b",), on_other_base=action
    )
    return msgspec.structs.replace(settings, adapters=adapters)


def _residency(gateway: Gateway) -> Any:

    return asyncio.run_coroutine_threadsafe(gateway.services.engine.residency(), gateway.loop).result(10)


def _once(admin: httpx.Client, name: str, state: str) -> Any:
    while (shown := admin.get(f"/admin/v1/adapters/{name}").json())["state"] != state:
        time.sleep(0.02)
    return shown
