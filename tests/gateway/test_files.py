"""/v1/files through the official SDK, and what uploads are refused for."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
import pytest_asyncio
from openai import APIStatusError, OpenAI
from sqlalchemy.ext.asyncio import AsyncEngine
from support.full_disk import largest_file
from support.gateway import Gateway, running, settings_in
from support.problems import assert_problem
from support.services import own_postgres_database

from loraplex.auth.store.database import open_database
from loraplex.auth.tenants import Tenants
from loraplex.config.settings import FileSettings
from loraplex.gateway.errors import StorageFull
from loraplex.gateway.files.store import FileStore, StoredFile

CONTENT = b'{"custom_id": "a"}\n' * 3


@pytest.fixture
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0) as client:
        yield client


@pytest_asyncio.fixture(params=["sqlite", "postgresql"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    async with AsyncExitStack() as stack:
        url = f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
        if request.param == "postgresql":
            url = await stack.enter_async_context(own_postgres_database())
        engine = await open_database(url)
        stack.push_async_callback(engine.dispose)
        yield engine


def upload(gateway: Gateway, *parts: tuple[str, Any], key: str | None = None) -> httpx.Response:
    with gateway.client(key) as client:
        return client.post("/v1/files", files=list(parts))


def test_file_lives_its_life(client: OpenAI, gateway: Gateway) -> None:
    made = client.files.create(file=("päck.jsonl", CONTENT), purpose="batch")
    assert (made.filename, made.bytes, made.purpose, made.status) == ("päck.jsonl", len(CONTENT), "batch", "processed")
    assert made.expires_at is not None
    assert abs(made.expires_at - made.created_at - 30 * 86400) <= 1
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == CONTENT
    assert made in list(client.files.list(purpose="batch"))
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.content(made.id)
    assert caught.value.code == "file_not_found"
    assert not (Path(gateway.services.files.path(gateway.tenant_id, made.id))).exists()


def test_list_goes_through_pages_in_either_order(gateway: Gateway) -> None:
    _, key = gateway.new_tenant("pages")
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=key) as client:
        made = [client.files.create(file=(str(number), b"x"), purpose="batch").id for number in range(5)]
        assert [file.id for file in client.files.list(limit=2, order="asc")] == made
        assert [file.id for file in client.files.list(limit=2)] == made[::-1]
        page = client.files.list(limit=2, order="asc")
        assert (page.has_more, [file.id for file in page.data]) == (True, made[:2])
        assert client.files.list(after=made[3], order="asc").has_more is False


def test_file_of_another_tenant_is_not_there(client: OpenAI, gateway: Gateway) -> None:
    made = client.files.create(file=("mine", CONTENT), purpose="batch")
    _, foreign = gateway.new_tenant("curious")
    with gateway.client(foreign) as other:
        assert other.get("/v1/files").json()["data"] == []
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert_problem(other.request(method, f"/v1/files/{made.id}{path}"), 404, "file_not_found", "file_id")
        assert_problem(other.get(f"/v1/files?after={made.id}"), 404, "file_not_found", "file_id")
    assert client.files.content(made.id).read() == CONTENT


@pytest.mark.parametrize("file_id", ["file-0", "%00", "file-" + "0" * 24, "..%2f..%2floraplex.db"])
def test_file_id_that_is_none_is_404(gateway: Gateway, file_id: str) -> None:
    with gateway.client() as client:
        response = client.get(f"/v1/files/{file_id}")
    assert response.status_code == 404


@pytest.mark.parametrize(
    ("parts", "code", "param"),
    [
        ([("purpose", (None, "batch"))], "invalid_request", "file"),
        ([("file", ("a", b"x"))], "invalid_request", "purpose"),
        ([("purpose", (None, "vision")), ("file", ("a", b"x"))], "unsupported_parameter", "purpose"),
        ([("purpose", (None, "batch")), ("file", ("a", b"x")), ("colour", (None, "red"))], "invalid_request", "colour"),
        ([("purpose", (None, "batch")), ("file", ("a", b"x")), ("file", ("b", b"y"))], "invalid_request", "file"),
        ([("purpose", (None, "b" * 2000)), ("file", ("a", b"x"))], "invalid_request", "purpose"),
        (
            [("purpose", (None, "batch")), ("file", ("a", b"x")), ("expires_after[anchor]", (None, "created_at"))],
            "invalid_request",
            "expires_after.seconds",
        ),
        (
            [("purpose", (None, "batch")), ("file", ("a", b"x")), ("expires_after[seconds]", (None, "3600"))],
            "invalid_request",
            "expires_after.anchor",
        ),
    ],
)
def test_upload_wrong_is_refused_by_name(gateway: Gateway, parts: list[Any], code: str, param: str) -> None:
    assert_problem(upload(gateway, *parts), 400, code, param)


def test_upload_expires_after_what_was_asked(client: OpenAI) -> None:
    made = client.files.create(
        file=("a", b"x"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.expires_at is not None
    assert abs(made.expires_at - made.created_at - 3600) <= 1


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"--x\r\nnonsense"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n\xff\r\n--x--',
        ),
        ("multipart/form-data; boundary=x", b"--x\r\nA: " + b"y" * 10_000),
    ],
)
def test_upload_that_is_no_form_is_400(gateway: Gateway, content_type: str, body: bytes) -> None:
    with gateway.client() as client:
        response = client.post("/v1/files", content=body, headers={"content-type": content_type})
    assert response.status_code in (400, 413), response.text
    assert response.json()["error"]["message"]


def test_upload_larger_than_any_file_may_be_is_413_and_leaves_nothing(gateway: Gateway) -> None:
    large = b"x" * (2**20 + 1)
    assert_problem(upload(gateway, ("purpose", (None, "batch")), ("file", ("a", large))), 413, "file_too_large", "file")
    assert not list(drafts(gateway))


def test_tenants_files_have_a_bound_together(gateway: Gateway) -> None:
    _, key = gateway.new_tenant("hoarder")
    full = [("purpose", (None, "batch")), ("file", ("a", b"x" * 2**20))]
    for _ in range(3):
        assert upload(gateway, *full, key=key).status_code == 200
    assert_problem(upload(gateway, *full, key=key), 413, "storage_full")
    with gateway.client(key) as client:
        client.delete("/v1/files/" + client.get("/v1/files").json()["data"][0]["id"])
        assert upload(gateway, *full, key=key).status_code == 200


@pytest.mark.parametrize("num_bytes", [2**19 + 1, 2**22], ids=["told-at-the-end", "told-while-it-comes"])
def test_upload_that_the_disk_has_no_room_for_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "an-admin-key-of-the-tests")
    settings = settings_in(tmp_path)
    files = msgspec.structs.replace(settings.files, max_file_bytes=2**23, max_tenant_bytes=2**24)
    with running(msgspec.structs.replace(settings, files=files), "an-admin-key-of-the-tests") as gateway:
        tenant, key = gateway.new_tenant("large")
        content = b"x" * num_bytes
        with largest_file(2**19), OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
            with pytest.raises(APIStatusError) as refused:
                client.files.create(file=("a", content), purpose="batch")
            assert (refused.value.status_code, refused.value.code) == (413, "storage_full")
            assert list((tmp_path / "files" / tenant).iterdir()) == []
        with OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
            assert client.files.create(file=("a", content), purpose="batch").bytes == num_bytes


async def test_draft_that_cannot_be_made_is_told(database: AsyncEngine, tmp_path: Path) -> None:
    store = FileStore(database, FileSettings(directory=str(tmp_path / "files")))
    (tmp_path / "files" / "t1").write_bytes(b"")
    with pytest.raises(StorageFull, match="cannot store the file"):
        await store.open_draft("t1")


async def test_files_are_their_servers_alone(database: AsyncEngine, tmp_path: Path) -> None:
    tenant = (await Tenants(database, b"pepper").create_tenant("t")).id
    store = FileStore(database, FileSettings(directory=str(tmp_path / "files")))
    draft = await store.open_draft(tenant)
    await draft.write(b"x")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "files" / tenant).iterdir()}
    kept = await store.keep(draft, tenant, "x", "batch", None)
    await draft.close()
    assert modes == {store.path(tenant, kept.id).stat().st_mode & 0o777} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "files", tmp_path / "files" / tenant)} == {0o700}


async def test_drafts_that_are_open_at_the_same_time_have_the_bound_together(
    database: AsyncEngine, tmp_path: Path
) -> None:
    tenant = (await Tenants(database, b"pepper").create_tenant("t")).id
    store = FileStore(database, FileSettings(directory=str(tmp_path / "files"), max_tenant_bytes=100))
    first, second = [await store.open_draft(tenant) for _ in range(2)]
    await first.write(b"x" * 60)
    with pytest.raises(StorageFull, match="40 bytes"):
        await second.write(b"x" * 41)
    await second.close()
    third = await store.open_draft(tenant)
    await first.write(b"x" * 40)
    with pytest.raises(StorageFull):
        await store.open_draft(tenant)
    await first.close()  # whatever it was, it was not kept
    await third.write(b"x" * 100)
    await store.keep(third, tenant, "third", "batch", None)
    await third.close()
    assert [path.stat().st_size for path in (tmp_path / "files" / tenant).iterdir()] == [100]


async def test_files_kept_by_several_gateways_at_the_same_time_have_the_bound_together(
    database: AsyncEngine, tmp_path: Path
) -> None:
    tenant = (await Tenants(database, b"pepper").create_tenant("t")).id
    settings = FileSettings(directory=str(tmp_path / "files"), max_tenant_bytes=100)
    stores = [FileStore(database, settings) for _ in range(4)]
    drafts = [await store.open_draft(tenant) for store in stores]
    for draft in drafts:
        await draft.write(b"x" * 60)
    kept = await asyncio.gather(
        *(store.keep(draft, tenant, "x", "batch", None) for store, draft in zip(stores, drafts, strict=True)),
        return_exceptions=True,
    )
    for draft in drafts:
        await draft.close()
    files = [file for file in kept if isinstance(file, StoredFile)]
    assert sorted(type(end).__name__ for end in kept) == ["StorageFull"] * 3 + ["StoredFile"]
    assert (await stores[0].page(tenant, purpose=None, after=None, limit=9, order="asc"))[0] == files
    assert [path.name for path in (tmp_path / "files" / tenant).iterdir()] == [files[0].id]


def test_upload_that_breaks_off_leaves_nothing(gateway: Gateway) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {gateway.api_key}\r\n"
        "content-type: multipart/form-data; boundary=x\r\ncontent-length: 100000\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"y" * 1000)
        until(lambda: bool(list(drafts(gateway))))
    until(lambda: not list(drafts(gateway)))


def test_tenant_deleted_takes_its_files_along(gateway: Gateway) -> None:
    tenant, key = gateway.new_tenant("leaving")
    made = upload(gateway, ("purpose", (None, "batch")), ("file", ("a", CONTENT)), key=key).json()["id"]
    path = gateway.services.files.path(tenant, made)
    assert path.read_bytes() == CONTENT
    with gateway.admin() as admin:
        assert admin.delete(f"/admin/v1/tenants/{tenant}").status_code == 204
    assert not path.parent.exists()


def test_sweep_removes_bytes_that_no_file_has(gateway: Gateway, client: OpenAI) -> None:
    import os

    kept = client.files.create(file=("kept", CONTENT), purpose="batch")
    home = gateway.services.files.path(gateway.tenant_id, kept.id).parent
    for name in ("draft-old", "file-old", "draft-new"):
        (home / name).write_bytes(b"x")
    long_ago = time.time() - 7200
    for name in ("draft-old", "file-old", kept.id):
        os.utime(home / name, (long_ago, long_ago))
    asyncio.run_coroutine_threadsafe(gateway.services.files.sweep(), gateway.loop).result(10)
    assert {path.name for path in home.iterdir() if "old" in path.name or "new" in path.name} == {"draft-new"}
    assert client.files.content(kept.id).read() == CONTENT
    (home / "draft-new").unlink()


def drafts(gateway: Gateway) -> Iterator[Path]:
    return gateway.services.files.path(gateway.tenant_id, "x").parent.glob("draft-*")


def until(condition: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
