"""PEFT files sent to the admin API: kept for good, and nothing left of what is refused or broke off."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from support.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_files
from support.full_disk import largest_file
from support.gateway import BASE, Gateway, running, settings_in
from support.problems import assert_problem


@pytest.fixture
def home(gateway: Gateway) -> Path:
    return gateway.adapter_dir.parent


@pytest.fixture
def admin(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.admin() as client:
        yield client


def sent(admin: httpx.Client, files: dict[str, bytes], **query: Any) -> httpx.Response:
    parts = [("file", (name, content)) for name, content in files.items()]
    return admin.post("/admin/v1/adapters/upload", params=query, files=parts)


def leftovers(home: Path) -> list[Path]:
    return list((home / "cache-uploads" / "staging").iterdir())


def test_upload_is_an_adapter_like_others(gateway: Gateway, admin: httpx.Client) -> None:
    made = sent(admin, adapter_files(1), name="sent")
    assert made.status_code == 201, made.text
    assert made.json()["source"] == f"upload://{made.json()['adapter_id']}"
    chat = {"model": "sent", "messages": [{"role": "user", "content": "x"}]}
    with gateway.client() as client:
        answer = client.post("/v1/chat/completions", json=chat).json()
        assert answer["choices"][0]["message"]["content"] == "sent: x"
    again = sent(admin, adapter_files(2), name="sent", update="true")
    assert (again.status_code, again.json()["version"]) == (200, 2)
    assert again.json()["adapter_id"] != made.json()["adapter_id"]
    assert admin.post("/admin/v1/adapters/sent/rollback").json()["adapter_id"] == made.json()["adapter_id"]


def test_dry_run_examines_and_enters_nothing(admin: httpx.Client) -> None:
    before = admin.get("/admin/v1/adapters").json()
    found = sent(admin, adapter_files(3), dry_run="true")
    assert (found.status_code, found.json()["card"]["rank"]) == (200, 4)
    assert admin.get("/admin/v1/adapters").json() == before


def _without(name: str) -> dict[str, bytes]:
    return {key: value for key, value in adapter_files().items() if key != name}


@pytest.mark.parametrize(
    ("files", "query", "status", "code"),
    [
        (_without(CONFIG_NAME), {}, 400, "adapter_invalid"),
        (_without(WEIGHTS_NAME), {}, 400, "adapter_invalid"),
        ({**_without(WEIGHTS_NAME), "adapter_model.bin": b"x"}, {}, 400, "adapter_invalid"),
        ({"adapter_model-00001-of-00002.safetensors": b"x"}, {}, 400, "adapter_unsupported"),
        ({**adapter_files(), "../escape.json": b"{}"}, {}, 400, "adapter_invalid"),
        ({**adapter_files(), "/etc/passwd": b"{}"}, {}, 400, "adapter_invalid"),
        ({**adapter_files(), CONFIG_NAME: b"{"}, {}, 400, "adapter_invalid"),
        ({**adapter_files(), CONFIG_NAME: b" " * (2**20 + 1)}, {}, 400, "adapter_too_large"),
        ({**adapter_files(), WEIGHTS_NAME: b"\xff" * 64}, {}, 400, "adapter_invalid"),
        (adapter_files(), {"name": ""}, 400, "invalid_request"),
        (adapter_files(), {"name": "team/echo-one"}, 409, "name_taken"),
        (adapter_files(), {"name": "nothing-yet", "update": "true"}, 404, "adapter_not_found"),
        (adapter_files(), {"update": "yes"}, 400, "invalid_request"),
        (adapter_files(), {"tenant_id": "tenant_none"}, 404, "tenant_not_found"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_upload_refused_leaves_nothing(
    admin: httpx.Client, home: Path, files: dict[str, bytes], query: dict[str, str], status: int, code: str
) -> None:
    before = admin.get("/admin/v1/adapters").json()
    refused = sent(admin, files, **{"name": "refused", **query})
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
    assert admin.get("/admin/v1/adapters").json() == before
    assert leftovers(home) == []


def test_file_sent_twice_and_part_without_a_file_are_refused(admin: httpx.Client, home: Path) -> None:
    twice = [("file", (CONFIG_NAME, b"{}")), ("file", (CONFIG_NAME, b"{}"))]
    refused = admin.post("/admin/v1/adapters/upload", params={"name": "twice"}, files=twice)
    assert_problem(refused, 400, "adapter_invalid")
    assert "twice" in refused.json()["error"]["message"]
    field = admin.post("/admin/v1/adapters/upload", params={"name": "x"}, files=[("name", (None, b"x"))])
    assert_problem(field, 400, "invalid_request", "file")
    assert_problem(admin.post("/admin/v1/adapters/upload", params={"name": "x"}, json={}), 400, "invalid_request")
    headers = {"content-type": "multipart/form-data; boundary=b"}
    for body in (
        b"",
        b"--b\r\n",
        b"nothing",
        b'--b\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\nx',
    ):
        broken = admin.post("/admin/v1/adapters/upload", params={"name": "x"}, content=body, headers=headers)
        assert broken.status_code == 400
    assert leftovers(home) == []


def test_upload_that_breaks_off_leaves_nothing(gateway: Gateway, home: Path) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    part = f'--b\r\nContent-Disposition: form-data; name="f"; filename="{WEIGHTS_NAME}"\r\n\r\n'.encode()
    head = (
        f"POST /admin/v1/adapters/upload?name=broken HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {gateway.admin_key}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000000\r\n\r\n"
    ).encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + part + b"x" * 3_000_000)
        while not leftovers(home):
            time.sleep(0.01)
    while leftovers(home):
        time.sleep(0.01)
    with gateway.admin() as admin:
        assert admin.get("/admin/v1/adapters/broken").status_code == 404


def test_upload_that_the_disk_has_no_room_for_is_refused_and_leaves_nothing(admin: httpx.Client, home: Path) -> None:
    with largest_file(2**23):  # the database's log is smaller
        refused = sent(admin, {**adapter_files(), WEIGHTS_NAME: bytes(2**23 + 1)}, name="large")
    assert_problem(refused, 503, "adapter_source_unavailable")
    assert leftovers(home) == []
    assert sent(admin, adapter_files(), name="large").status_code == 201


def test_upload_larger_than_the_limit_is_refused_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
    settings = settings_in(tmp_path, max_body_bytes=1000)
    settings = msgspec.structs.replace(settings, adapters=msgspec.structs.replace(settings.adapters, max_bytes=2**20))
    with running(settings, "k") as gateway, gateway.admin() as admin:
        assert sent(admin, adapter_files(1, size=4096), name="fits").status_code == 201  # though no other body would
        large = sent(admin, adapter_files(1, size=2**18), name="large")
        assert_problem(large, 400, "adapter_too_large")


def test_upload_outlives_the_cache_and_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
    with running(settings_in(tmp_path), "k") as gateway, gateway.admin() as admin:
        made = sent(admin, adapter_files(1), name="kept").json()
    shutil.rmtree(tmp_path / "cache")
    with running(settings_in(tmp_path), "k") as gateway, gateway.admin() as admin:
        chat = {"model": "kept", "messages": [{"role": "user", "content": "x"}]}
        answer = admin.post("/v1/chat/completions", json=chat).json()
        assert answer["choices"][0]["message"]["content"] == "kept: x"
        assert admin.get("/admin/v1/adapters/kept").json()["adapter_id"] == made["adapter_id"]
        assert [model["id"] for model in admin.get("/v1/models").json()["data"]] == [BASE, "kept"]


def test_upload_cannot_be_registered_by_who_knows_its_hash(gateway: Gateway, admin: httpx.Client) -> None:
    tenant, _ = gateway.new_tenant("uploader")
    made = sent(admin, adapter_files(7), name="owned", tenant_id=tenant).json()
    assert made["tenant_id"] == tenant
    other, _ = gateway.new_tenant("guesser")
    with gateway.admin() as admin_client:
        key = admin_client.post(f"/admin/v1/tenants/{other}/keys", json={"role": "tenant-admin"}).json()["key"]
    with gateway.client(key) as guesser:
        body = {"name": "stolen", "source": made["source"]}
        assert_problem(guesser.post("/admin/v1/adapters", json=body), 403, "adapter_source_forbidden")
        own = sent(guesser, adapter_files(7), name="own")  # who has the files has them
        assert (own.status_code, own.json()["tenant_id"]) == (201, other)
