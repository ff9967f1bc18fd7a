"""/v1/batches: every line answered once, by the routes themselves, whatever happens meanwhile."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from openai.types import Batch
from openai.types.chat import ChatCompletion
from support.batching import begin, jsonl, lines_of, request_line, show, text_of, upload, wait
from support.gateway import BASE, Gateway, running, settings_in, wait_running
from support.problems import assert_problem
from support.strict import strictly

from loraplex.engines.protocol import Embedding, EmbedRequest, GenerateRequest, TokenEvent

SLOW = "<slow>" + "x" * 12  # most of a second


def test_batch_through_the_sdk_from_input_to_output(gateway: Gateway) -> None:
    content = jsonl(*(request_line(f"line-{number}", f"text {number}") for number in range(20)))
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key) as client:
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"for": "a test"},
            output_expires_after={"anchor": "created_at", "seconds": 3600},
        )  # fmt: skip
        assert (batch.status, batch.metadata) == ("validating", {"for": "a test"})
        while client.batches.retrieve(batch.id).status != "completed":
            time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
        assert batch.id in [one.id for one in client.batches.list(limit=1)]
        assert batch.request_counts is not None
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (20, 20, 0)
        assert batch.error_file_id is None
        assert batch.output_file_id is not None
        output = client.files.retrieve(batch.output_file_id)
        assert output.purpose == "batch_output"
        assert output.expires_at == output.created_at + 3600
    with gateway.client() as http:
        found = lines_of(http, batch.output_file_id)
    assert [(line["custom_id"], text_of(line)) for line in found] == [(f"line-{n}", f"text {n}") for n in range(20)]
    prompts = sum(len(f"text {n}") for n in range(20))
    assert batch.usage is not None
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (prompts, prompts + 20)
    for line in found:
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        assert set(line) == {"id", "custom_id", "response", "error"}
        assert line["response"]["request_id"] == line["id"]
        ChatCompletion.model_validate(line["response"]["body"])


def test_batch_is_strictly_the_sdks_type_in_every_state(gateway: Gateway) -> None:
    seen = set()
    with gateway.client() as client:
        batch_id = begin(client, jsonl(*(request_line(str(number), SLOW) for number in range(3))))
        while (batch := strictly(Batch, client.get(f"/v1/batches/{batch_id}"))).status != "completed":
            seen.add(batch.status)
        strictly(Batch, client.get(f"/v1/batches/{begin(client, b'nonsense')}"))
    assert "in_progress" in seen


def test_completions_and_mixed_models_are_lines_like_any(gateway: Gateway) -> None:
    lines = [
        {**request_line(model, url="/v1/completions"), "body": {"model": model, "prompt": "ab", "max_tokens": 40}}
        for model in (BASE, "team/echo-one")
    ]
    with gateway.client() as client:
        batch = wait(client, begin(client, jsonl(*lines), "/v1/completions"))
        found = lines_of(client, batch["output_file_id"])
    assert [line["response"]["body"]["choices"][0]["text"] for line in found] == ["ab", "team/echo-one: ab"]


def test_lines_that_fail_are_in_the_error_file_with_their_status(gateway: Gateway) -> None:
    lines = [
        request_line("good"),
        request_line("unknown", model="nobody"),
        request_line("wrong", temperature=9),
        request_line("breaks", "<fail>......"),
    ]
    with gateway.client() as client:
        batch = wait(client, begin(client, jsonl(*lines)))
        output, errors = lines_of(client, batch["output_file_id"]), lines_of(client, batch["error_file_id"])
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 4, "completed": 1, "failed": 3}
    assert [line["custom_id"] for line in output] == ["good"]
    told = {
        line["custom_id"]: (line["response"]["status_code"], line["response"]["body"]["error"]["code"])
        for line in errors
    }
    assert told == {
        "unknown": (404, "model_not_found"),
        "wrong": (400, "invalid_request"),
        "breaks": (500, "generation_failed"),
    }


def test_answer_with_ends_of_lines_in_it_is_one_line_to_every_reader(gateway: Gateway) -> None:
    text = "a\u2028b\u2029c\x85d\ne\rf\x1c\\u2028é"
    lines = [request_line(text, text), request_line(f"{text}wrong", text, model=text)]
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key) as client, gateway.client() as http:
        batch = wait(http, begin(http, jsonl(*lines)))
        [good], [bad] = (
            [json.loads(line) for line in client.files.content(batch[field]).iter_lines()]
            for field in ("output_file_id", "error_file_id")
        )
    assert (good["custom_id"], text_of(good)) == (text, text)
    assert bad["custom_id"] == f"{text}wrong"


def test_engine_that_dies_is_waited_for_but_not_by_the_line_that_kills_it(gateway: Gateway) -> None:
    lines = [request_line("killer", "<die>......"), request_line("neighbour", SLOW)]
    with gateway.client() as client:
        batch = wait(client, begin(client, jsonl(*lines)))
        errors = lines_of(client, batch["error_file_id"])
        assert [text_of(line) for line in lines_of(client, batch["output_file_id"])] == [SLOW]
    assert [(line["custom_id"], line["response"]["body"]["error"]["code"]) for line in errors] == [
        ("killer", "engine_died")
    ]


@pytest.mark.parametrize(
    ("content", "code", "line", "param"),
    [
        (b"", "empty_file", None, None),
        (b"\n \n", "empty_file", None, None),
        (b"{", "invalid_json_line", 1, None),
        (jsonl(request_line("a")) + b"\xff\n", "invalid_json_line", 2, None),
        (b"[" * 100_000, "invalid_json_line", 1, None),
        (jsonl({"custom_id": "a"}), "invalid_json_line", 1, None),
        (jsonl({**request_line("a"), "colour": 1}), "invalid_json_line", 1, None),
        (jsonl({**request_line("a"), "method": "GET"}), "invalid_json_line", 1, None),
        (jsonl({**request_line("a"), "body": []}), "invalid_json_line", 1, "body"),
        (jsonl(request_line("a", url="/v1/completions")), "mismatched_url", 1, "url"),
        (jsonl(request_line("a"), request_line("a")), "duplicate_custom_id", 2, "custom_id"),
        (jsonl(request_line("a", stream=True)), "stream_not_possible", 1, "body.stream"),
    ],
)  # fmt: skip
def test_input_that_cannot_be_worked_on_fails_the_batch_and_names_the_line(
    gateway: Gateway, content: bytes, code: str, line: int | None, param: str | None
) -> None:
    with gateway.client() as client:
        batch = wait(client, begin(client, content))
    assert batch["status"] == "failed"
    assert (batch["failed_at"] is None, batch["output_file_id"]) == (False, None)
    problem = batch["errors"]["data"][0]
    assert (problem["code"], problem["line"], problem["param"]) == (code, line, param)
    assert problem["message"]


@pytest.mark.parametrize(
    ("changes", "code", "param", "status"),
    [
        ({"input_file_id": "file-none"}, "file_not_found", "file_id", 404),
        ({"endpoint": "/v1/moderations"}, "invalid_request", "endpoint", 400),
        ({"completion_window": "1h"}, "invalid_request", "completion_window", 400),
        ({"metadata": {"k": "\0"}}, "invalid_request", "metadata[...]", 400),
        ({"metadata": {str(n): "v" for n in range(17)}}, "invalid_request", "metadata", 400),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "invalid_request",
         "output_expires_after.seconds", 400),
        ({"colour": "red"}, "unknown_parameter", "colour", 400),
    ],
)  # fmt: skip
def test_batch_wrong_is_refused_by_name(
    gateway: Gateway, changes: dict[str, Any], code: str, param: str, status: int
) -> None:
    with gateway.client() as client:
        body = {
            "input_file_id": upload(client, jsonl(request_line("a"))),
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        assert_problem(client.post("/v1/batches", json={**body, **changes}), status, code, param)


def test_batch_of_another_tenant_is_not_there(gateway: Gateway) -> None:
    _, foreign = gateway.new_tenant("onlooker")
    with gateway.client() as client, gateway.client(foreign) as other:
        batch_id = begin(client, jsonl(request_line("a")))
        batch = wait(client, batch_id)
        assert other.get("/v1/batches").json()["data"] == []
        assert_problem(other.get(f"/v1/batches/{batch_id}"), 404, "batch_not_found", "batch_id")
        assert_problem(other.post(f"/v1/batches/{batch_id}/cancel"), 404, "batch_not_found", "batch_id")
        assert_problem(other.get(f"/v1/batches?after={batch_id}"), 404, "batch_not_found", "batch_id")
        assert_problem(other.get(f"/v1/files/{batch['output_file_id']}/content"), 404, "file_not_found", "file_id")
        body = {"input_file_id": batch["input_file_id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        assert_problem(other.post("/v1/batches", json=body), 404, "file_not_found", "file_id")
        assert_problem(client.get("/v1/batches/%00"), 404, "batch_not_found", "batch_id")


def test_cancelled_batch_keeps_what_was_answered_and_tells_of_the_rest(gateway: Gateway) -> None:
    lines = [request_line("quick"), *(request_line(f"slow-{number}", "<slow>" + "y" * 200) for number in range(30))]
    with gateway.client() as client:
        batch_id = begin(client, jsonl(*lines))
        wait(client, batch_id, answered=1)
        assert_problem(
            client.delete(f"/v1/files/{show(client, batch_id)['input_file_id']}"), 409, "file_in_use", "file_id"
        )
        assert client.post(f"/v1/batches/{batch_id}/cancel").json()["status"] == "cancelling"
        batch = wait(client, batch_id)
        assert (batch["status"], batch["request_counts"]) == ("cancelled", {"total": 31, "completed": 1, "failed": 30})
        assert [line["custom_id"] for line in lines_of(client, batch["output_file_id"])] == ["quick"]
        errors = lines_of(client, batch["error_file_id"])
        assert {(line["error"]["code"], line["response"]) for line in errors} == {("batch_cancelled", None)}
        assert_problem(client.post(f"/v1/batches/{batch_id}/cancel"), 409, "batch_not_cancellable", "batch_id")
        assert client.delete(f"/v1/files/{batch['input_file_id']}").status_code == 200
    assert gateway.stats().num_running == 0


def test_batch_whose_window_ends_keeps_what_was_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
    settings = settings_in(tmp_path)
    with running(settings, "k") as gateway:
        _, key = gateway.new_tenant("tests")
        with gateway.client(key) as client:
            batch_id = begin(client, jsonl(request_line("quick"), request_line("slow", "<slow>" + "y" * 400)))
            assert wait(client, batch_id, answered=1)["status"] == "in_progress"
    with sqlite3.connect(tmp_path / "loraplex.db") as database:
        database.execute("UPDATE batches SET expires_at = ? WHERE id = ?", (time.time(), batch_id))
    database.close()
    with running(settings, "k") as gateway, gateway.client(key) as client:
        batch = wait(client, batch_id)
        assert (batch["status"], batch["expired_at"] is None) == ("expired", False)
        assert [line["custom_id"] for line in lines_of(client, batch["output_file_id"])] == ["quick"]
        errors = lines_of(client, batch["error_file_id"])
        assert [(line["custom_id"], line["error"]["code"]) for line in errors] == [("slow", "batch_expired")]


def test_lines_wait_for_a_rate_limit_and_none_is_lost(gateway: Gateway) -> None:
    tenant, key = gateway.new_tenant("limited")
    with gateway.admin() as admin, gateway.client(key) as client:
        admin.put(f"/admin/v1/tenants/{tenant}/limits", json={"requests_per_minute": 120})
        batch = wait(client, begin(client, jsonl(*(request_line(str(number)) for number in range(122)))), seconds=60)
    assert batch["request_counts"] == {"total": 122, "completed": 122, "failed": 0}


def test_budget_that_is_spent_is_told_line_by_line(gateway: Gateway) -> None:
    tenant, key = gateway.new_tenant("poor")
    with gateway.admin() as admin, gateway.client(key) as client:
        admin.put(f"/admin/v1/tenants/{tenant}/limits", json={"tokens_per_day": 0})
        batch = wait(client, begin(client, jsonl(request_line("a"))))
        errors = lines_of(client, batch["error_file_id"])
    assert [line["response"]["body"]["error"]["code"] for line in errors] == ["insufficient_quota"]


def test_key_that_is_revoked_ends_its_batches_lines(gateway: Gateway) -> None:
    tenant, key = gateway.new_tenant("revoked")
    with gateway.admin() as admin:
        other = admin.post(f"/admin/v1/tenants/{tenant}/keys", json={}).json()["key"]
        with gateway.client(key) as client:
            lines = [request_line(str(number), SLOW) for number in range(40)]
            batch_id = begin(client, jsonl(*lines))
            wait(client, batch_id, answered=1)
        key_id = admin.get(f"/admin/v1/tenants/{tenant}/keys").json()["data"][0]["id"]
        admin.delete(f"/admin/v1/tenants/{tenant}/keys/{key_id}")
    with gateway.client(other) as client:
        batch = wait(client, batch_id)
        errors = lines_of(client, batch["error_file_id"])
    assert batch["request_counts"]["completed"] >= 1
    assert {line["response"]["body"]["error"]["code"] for line in errors} == {"invalid_api_key"}


def test_lines_reach_the_engine_in_the_background_as_their_tenant(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[GenerateRequest] = []
    engine = gateway.services.engine
    generate = engine.generate

    def watching(request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        seen.append(request)
        return generate(request)

    monkeypatch.setattr(engine, "generate", watching)
    with gateway.client() as client:
        wait(client, begin(client, jsonl(request_line("a"))))
        client.post("/v1/chat/completions", json=request_line("b")["body"])
    assert [(request.is_background, request.tenant) for request in seen] == [
        (True, gateway.tenant_id),
        (False, gateway.tenant_id),
    ]


def test_texts_to_embed_reach_the_engine_in_the_background(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EmbedRequest] = []
    engine = gateway.services.engine
    embed = engine.embed

    async def watching(request: EmbedRequest) -> Embedding:
        seen.append(request)
        return await embed(request)

    monkeypatch.setattr(engine, "embed", watching)
    body = {"model": BASE, "input": ["a", "b"]}
    with gateway.client() as client:
        line = {**request_line("a", url="/v1/embeddings"), "body": body}
        wait(client, begin(client, jsonl(line), "/v1/embeddings"))
        client.post("/v1/embeddings", json=body)
    assert [request.is_background for request in seen] == [True, True, False, False]


def test_batch_leaves_room_for_its_tenants_users(gateway: Gateway) -> None:
    tenant, key = gateway.new_tenant("narrow")
    with gateway.admin() as admin, gateway.client(key) as client:
        admin.put(f"/admin/v1/tenants/{tenant}/limits", json={"concurrent_requests": 2})
        batch_id = begin(client, jsonl(*(request_line(str(number), SLOW) for number in range(4))))
        wait(client, batch_id, answered=1)
        assert client.post("/v1/chat/completions", json=request_line("user")["body"]).status_code == 200
        assert wait(client, batch_id)["request_counts"]["completed"] == 4


def test_tenant_deleted_ends_its_batches(gateway: Gateway) -> None:
    tenant, key = gateway.new_tenant("gone")
    with gateway.admin() as admin, gateway.client(key) as client:
        batch_id = begin(client, jsonl(*(request_line(str(number), "<slow>" + "y" * 300) for number in range(20))))
        wait_running(gateway)
        assert admin.delete(f"/admin/v1/tenants/{tenant}").status_code == 204
        assert client.get(f"/v1/batches/{batch_id}").status_code == 401
    deadline = time.monotonic() + 10
    while gateway.stats().num_running:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_batches_are_listed_newest_first_in_pages(gateway: Gateway) -> None:
    _, key = gateway.new_tenant("pages-of-batches")
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=key) as client, gateway.client(key) as http:
        made = [begin(http, jsonl(request_line("a"))) for _ in range(3)]
        assert [batch.id for batch in client.batches.list(limit=2)] == made[::-1]
        assert_problem(http.get("/v1/batches?limit=101"), 400, "invalid_request", "limit")
        assert_problem(http.get("/v1/batches?colour=red"), 400, "unknown_parameter", "colour")
        for batch_id in made:
            wait(http, batch_id)
