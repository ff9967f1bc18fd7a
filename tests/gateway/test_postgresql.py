"""The gateway with its tables in PostgreSQL: the same life as on SQLite, and the same refusals."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from support.batching import begin, jsonl, lines_of, request_line, text_of, wait
from support.gateway import BASE, Gateway, running, settings_in, write_adapter
from support.problems import assert_problem
from support.services import own_postgres_database

from loraplex.config.settings import Database, Settings


@pytest_asyncio.fixture
async def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Settings]:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
    async with own_postgres_database() as url:
        yield msgspec.structs.replace(settings_in(tmp_path), database=Database(url=url))


@pytest.fixture
def on_postgresql(settings: Settings, tmp_path: Path) -> Iterator[Gateway]:
    with running(settings, "k") as gateway:
        gateway.tenant_id, gateway.api_key = gateway.new_tenant("tests")
        gateway.adapter_dir = tmp_path / "local"
        yield gateway


def test_tenants_adapters_and_chat_work(on_postgresql: Gateway) -> None:
    source = write_adapter(on_postgresql.adapter_dir / "one")
    with on_postgresql.admin() as admin, on_postgresql.client() as client:
        body = {"name": "one", "source": str(source), "tenant_id": on_postgresql.tenant_id}
        assert admin.post("/admin/v1/adapters", json=body).status_code == 201
        assert_problem(admin.post("/admin/v1/adapters", json=body), 409, "name_taken", "name")
        chat = {"model": "one", "messages": [{"role": "user", "content": "x"}]}
        answer = client.post("/v1/chat/completions", json=chat).json()
        assert answer["choices"][0]["message"]["content"] == "one: x"
        assert admin.delete(f"/admin/v1/tenants/{on_postgresql.tenant_id}").status_code == 204
        assert_problem(client.post("/v1/chat/completions", json=chat), 401, "invalid_api_key")


def test_names_that_postgresql_cannot_hold_are_refused(on_postgresql: Gateway) -> None:
    with on_postgresql.admin() as admin:
        assert_problem(admin.post("/admin/v1/tenants", json={"name": "a\0b"}), 400, "invalid_request", "name")
        assert_problem(admin.get("/admin/v1/tenants/%00"), 404, "tenant_not_found")
        assert_problem(admin.delete("/admin/v1/tenants/%00"), 404, "tenant_not_found")
        assert_problem(admin.delete("/admin/v1/tenants/x/keys/%00"), 404, "key_not_found")
        body = {"name": "x", "source": "/x", "tenant_id": "\0"}
        assert_problem(admin.post("/admin/v1/adapters", json=body), 404, "tenant_not_found")


def test_catalogue_survives_a_restart(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    source = write_adapter(tmp_path / "local" / "kept")
    with running(settings, "k") as gateway:
        _, key = gateway.new_tenant("t")
        with gateway.admin() as admin:
            assert admin.post("/admin/v1/adapters", json={"name": "kept", "source": str(source)}).status_code == 201
    with running(settings, "k") as gateway, gateway.client(key) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [BASE, "kept"]
    assert list(Path.cwd().iterdir()) == []  # nothing strays: what a gateway writes lies where its settings say


def test_batch_of_one_gateway_is_finished_by_another(settings: Settings, tmp_path: Path) -> None:
    texts = {f"line-{number}": f"<slow>{number}" for number in range(40)}
    content = jsonl(*(request_line(custom_id, text) for custom_id, text in texts.items()))
    with running(settings, "k") as second:
        tenant, key = second.new_tenant("t")
        with running(settings, "k") as first:
            with first.client(key) as client:
                batch_id = begin(client, content)
                wait(client, batch_id, answered=5)
        with second.client(key) as client:
            batch = wait(client, batch_id)
            found = lines_of(client, batch["output_file_id"])
            assert_problem(client.get("/v1/files/%00"), 404, "file_not_found", "file_id")
            assert_problem(client.get("/v1/batches/%00"), 404, "batch_not_found", "batch_id")
        with second.admin() as admin:
            assert admin.delete(f"/admin/v1/tenants/{tenant}").status_code == 204
    assert batch["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
    assert {line["custom_id"]: text_of(line) for line in found} == texts
    assert len(found) == 40
