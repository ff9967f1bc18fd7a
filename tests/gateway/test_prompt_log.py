"""Prompts and answers are kept of those who opted in, whole and in their own words, and of nobody else."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.gateway import BASE, Gateway, running, settings_in

from loraplex.config.settings import UsageSettings

ADMIN_KEY = "an-admin-key-of-the-tests"


class Log:
    """A gateway and its log of prompts."""

    def __init__(self, gateway: Gateway, path: Path) -> None:
        self.gateway = gateway
        self.path = path
        self._names = iter(range(1000))

    def tenant(self, **limits: object) -> tuple[str, str, str]:
        """(tenant id, key id, key)"""
        with self.gateway.admin() as admin:
            body = {"name": f"t{next(self._names)}", "limits": limits}
            tenant = admin.post("/admin/v1/tenants", json=body).json()["id"]
            made = admin.post(f"/admin/v1/tenants/{tenant}/keys", json={"role": "tenant-admin"}).json()
            return tenant, made["id"], made["key"]

    def chat(self, key: str, text: str, **fields: object) -> Any:
        with self.gateway.client(key) as client:
            body = {"model": BASE, "messages": [{"role": "user", "content": text}], **fields}
            return client.post("/v1/chat/completions", json=body)

    def lines(self, key_id: str | None = None) -> list[Any]:
        text = self.path.read_text() if self.path.exists() else ""
        assert text == "" or text.endswith("\n")
        return [line for line in map(json.loads, text.splitlines()) if key_id in (None, line["key_id"])]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Log]:
    home = tmp_path_factory.mktemp("prompts")
    path = home / "prompts.jsonl"
    path.touch(0o644)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPLEX_TEST_ADMIN_KEY", ADMIN_KEY)
        settings = msgspec.structs.replace(settings_in(home), usage=UsageSettings(prompt_log=str(path)))
        with running(settings, ADMIN_KEY) as gateway:
            yield Log(gateway, path)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_of_a_tenant_that_opted_in_is_one_line(log: Log, stream: bool) -> None:
    tenant_id, key_id, key = log.tenant(log_prompts=True)
    began = time.time()
    answer = log.chat(key, "say héllo", stream=stream)
    (line,) = log.lines(key_id)
    assert began - 1 <= line.pop("at") <= time.time()
    assert line == {
        "request_id": answer.headers["x-request-id"],
        "route": "/v1/chat/completions",
        "tenant_id": tenant_id,
        "key_id": key_id,
        "model": BASE,
        "prompts": ["say héllo"],
        "answers": [{"prompt": 0, "text": "say héllo", "finish_reason": "stop"}],
        "outcome": "completed",
    }
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    assert key not in log.path.read_text()


def test_every_prompt_and_choice_is_there_in_every_api(log: Log) -> None:
    _, key_id, key = log.tenant(log_prompts=True)
    with log.gateway.client(key) as client:
        body = {"model": BASE, "prompt": ["one", "two"], "n": 2, "max_tokens": 2}
        assert client.post("/v1/completions", json=body).status_code == 200
        assert client.post("/v1/responses", json={"model": BASE, "input": "three"}).status_code == 200
        assert client.post("/generate", json={"inputs": "four"}).status_code == 200
    completions, responses, generate = log.lines(key_id)
    assert completions["prompts"] == ["one", "two"]
    assert completions["answers"] == [
        {"prompt": prompt, "text": text, "finish_reason": "length"}
        for prompt, text in enumerate(("on", "tw"))
        for _ in range(2)
    ]
    assert (responses["route"], responses["prompts"]) == ("/v1/responses", ["three"])
    assert responses["answers"][0]["text"] == "three"
    assert (generate["route"], generate["prompts"]) == ("/generate", ["four"])
    assert generate["answers"][0]["text"] == "four"


def test_of_those_who_did_not_opt_in_nothing_is_kept(log: Log) -> None:
    """Another tenant, a key that stays out of what its tenant does, and an admin."""
    _, _, silent = log.tenant()
    tenant_id, _, loud = log.tenant(log_prompts=True)
    with log.gateway.client(loud) as client:
        body = {"limits": {"log_prompts": False}}
        kept_out = client.post(f"/admin/v1/tenants/{tenant_id}/keys", json=body).json()["key"]
    before = log.path.read_bytes()
    for key in (silent, kept_out, ADMIN_KEY):
        assert log.chat(key, "a private matter").status_code == 200
        assert log.chat(key, "a private matter", stream=True).status_code == 200
    assert log.path.read_bytes() == before


def test_tenants_own_admin_opts_in_and_out_of_it(log: Log) -> None:
    tenant_id, key_id, key = log.tenant()
    with log.gateway.client(key) as client:
        path = f"/admin/v1/tenants/{tenant_id}/keys/{key_id}/limits"
        for is_in in (True, False):
            shown = client.put(path, json={"log_prompts": is_in}).json()
            assert shown["effective"]["log_prompts"] is is_in
            log.chat(key, f"in: {is_in}")
    assert [line["prompts"] for line in log.lines(key_id)] == [["in: True"]]


def test_what_failed_or_was_left_is_kept_as_far_as_it_came(log: Log) -> None:
    _, key_id, key = log.tenant(log_prompts=True)
    log.chat(key, "<fail>......")
    with log.gateway.client(key) as client:
        body = {"model": BASE, "messages": [{"role": "user", "content": "<slow>" + "x" * 200}], "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()  # one that is collected closes the stream
            next(lines)
    deadline = time.monotonic() + 20
    while len(found := log.lines(key_id)) < 2:
        assert time.monotonic() < deadline, "the end of what was left is not written"
        time.sleep(0.02)
    failed, left = found
    assert (failed["outcome"], failed["answers"][0]["finish_reason"]) == ("GenerationFailed", None)
    assert left["outcome"] == "aborted"
    assert 0 < len(left["answers"][0]["text"]) < 206


def test_line_that_was_cut_short_spoils_no_other(log: Log) -> None:
    _, key_id, key = log.tenant(log_prompts=True)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b'{"at": 1, "prom')
    for text in ("one", "two"):
        assert log.chat(key, text).status_code == 200
    cut, *lines = log.path.read_bytes().removeprefix(whole).splitlines()
    log.path.write_bytes(whole + b"".join(line + b"\n" for line in lines))
    assert cut == b'{"at": 1, "prom'
    assert [line["prompts"] for line in log.lines(key_id)] == [["one"], ["two"]]
    assert len(lines) == 2


def test_file_that_cannot_be_written_to_costs_no_answer(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    _, _, key = log.tenant(log_prompts=True)
    moved = log.path.rename(log.path.with_suffix(".moved"))
    log.path.mkdir()
    try:
        answer = log.chat(key, "a private matter")
    finally:
        log.path.rmdir()
        moved.rename(log.path)
    assert answer.status_code == 200
    assert f"the log of prompts lacks request {answer.headers['x-request-id']}" in caplog.text
    assert "private" not in caplog.text
