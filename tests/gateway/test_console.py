"""Operators' commands against a live gateway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from support.adapter_files import adapter_files, write_files
from support.gateway import BASE, Gateway, write_adapter
from typer import Exit
from typer.testing import CliRunner, Result

from loraplex.gateway.cli import app
from loraplex.gateway.console.client import AdminClient, CommandFailed
from loraplex.gateway.console.commands import Session, fail


def run(gateway: Gateway, *arguments: str, key: str | None = None, stdin: str = "") -> Result:
    """In this process; starting one for each would take most of the tests' time."""
    environment = {"LORAPLEX_URL": gateway.url, "LORAPLEX_ADMIN_KEY": gateway.admin_key if key is None else key}
    return CliRunner().invoke(app, arguments, env=environment, input=stdin)


def told(gateway: Gateway, *arguments: str, **options: Any) -> Any:
    """What a command answers with --json."""
    done = run(gateway, *arguments, "--json", **options)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_tenant_with_its_keys_and_limits_lives_its_life(gateway: Gateway) -> None:
    name = f"console-{uuid.uuid4().hex[:8]}"
    tenant = told(gateway, "tenants", "create", name, "max_tokens=50", "allowed_models=echo*,team/*")["id"]
    key = told(gateway, "keys", "create", name, "--name", "production", "--expires", "2199-01-31", "weight=0.5")
    assert (key["name"], key["limits"]["weight"], key["expires_at"]) == ("production", 0.5, 7229174400.0)
    with gateway.client(key["key"]) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [BASE, "team/echo-one"]
        body = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    changed = told(gateway, "limits", "set", tenant, "requests_per_minute=60", "allowed_models=none")
    assert {name: value for name, value in changed["limits"].items() if value is not None} == {
        "max_tokens": 50, "requests_per_minute": 60,
    }  # fmt: skip
    told(gateway, "limits", "set", name, "priority=3", "--key-id", key["id"])
    shown = run(gateway, "limits", "show", name, "--key-id", key["id"])
    assert [line.split() for line in shown.stdout.splitlines()] == [
        ["limit", "set", "here", "in", "force"],
        ["requests_per_minute", "-", "60"],
        ["max_tokens", "-", "50"],
        ["weight", "0.5", "0.5"],
        ["priority", "3", "3"],
    ]
    rotated = told(gateway, "keys", "rotate", name, key["id"], "--overlap-seconds", "0")
    assert rotated["id"] == key["id"]
    assert rotated["key"] != key["key"]
    listed = run(gateway, "keys", "list", tenant).stdout
    assert key["id"] in listed
    assert rotated["last_four"] in listed
    assert rotated["key"] not in listed
    assert "2199-01-31 00:00:00" in listed
    usage = told(gateway, "usage", "--by", "tenant,model", "--tenant", name)["data"]
    assert [(row["model"], row["num_requests"]) for row in usage] == [(BASE, 1)]
    assert run(gateway, "keys", "revoke", name, key["id"]).stdout == f"Revoked {key['id']}.\n"
    audit = told(gateway, "audit", "--tenant", tenant, "--limit", "3")
    assert [row["action"] for row in audit["data"]] == ["revoke_key", "rotate_key", "set_key_limits"]
    assert f"--after {audit['last_id']}" in run(gateway, "audit", "--tenant", tenant, "--limit", "3").stdout
    assert run(gateway, "tenants", "delete", name, stdin="n\n").exit_code == 2
    assert run(gateway, "tenants", "delete", name, "--yes").exit_code == 0
    assert name not in run(gateway, "tenants", "list").stdout


def test_adapters_secrets_and_admin_keys(gateway: Gateway) -> None:
    name, tenant = f"console-{uuid.uuid4().hex[:8]}", f"console-{uuid.uuid4().hex[:8]}"
    run(gateway, "tenants", "create", tenant)
    added = run(gateway, "adapters", "add", name, str(gateway.adapter_dir / "shared"), "--tenant", tenant)
    assert added.exit_code == 0, added.stderr
    assert name in added.stdout
    assert told(gateway, "adapters", "warm", name, "--tenant", tenant)["tier"] == "device"
    assert "versions" in run(gateway, "adapters", "show", name, "--tenant", tenant).stdout
    assert [one["name"] for one in told(gateway, "adapters", "list", "--tenant", tenant)["data"]] == [name]
    last = told(gateway, "adapters", "list", "--limit", "1")["last_id"]
    assert f"--after {last}" in run(gateway, "adapters", "list", "--limit", "1").stdout
    second = told(gateway, "adapters", "list", "--limit", "1", "--after", last)
    assert second["data"] == told(gateway, "adapters", "list")["data"][1:2]
    assert run(gateway, "adapters", "delete", name, "--tenant", tenant).exit_code == 0
    put = run(gateway, "secrets", "put", tenant, "hub_token", stdin="hf_deep-secret\n")
    assert put.exit_code == 0, put.stderr
    assert "deep-secret" not in put.stdout + run(gateway, "secrets", "list", tenant).stdout
    assert run(gateway, "secrets", "delete", tenant, "hub_token").exit_code == 0
    made = told(gateway, "admin-keys", "create", "console")
    assert told(gateway, "tenants", "list", key=made["key"])["data"]
    assert run(gateway, "admin-keys", "revoke", made["id"]).exit_code == 0
    assert made["id"] in run(gateway, "admin-keys", "list").stdout
    assert run(gateway, "tenants", "list", key=made["key"]).exit_code == 1


def test_versions_of_an_adapter_come_and_go(gateway: Gateway, tmp_path: Path) -> None:
    name = f"console/{uuid.uuid4().hex[:8]}"
    first, second = (str(write_adapter(gateway.adapter_dir / f"{name}-{rank}", rank)) for rank in (41, 42))
    assert told(gateway, "adapters", "add", name, first)["card"]["rank"] == 41
    updated = told(gateway, "adapters", "update", name, second)
    assert (updated["version"], updated["card"]["rank"]) == (2, 42)
    assert told(gateway, "adapters", "update", name)["adapter_id"] == updated["adapter_id"]
    uploaded = told(gateway, "adapters", "upload", name, str(write_adapter(tmp_path / "own", 43)), "--update")
    assert (uploaded["version"], uploaded["card"]["rank"]) == (4, 43)
    assert uploaded["source"].startswith("upload://")
    versions = told(gateway, "adapters", "versions", name)["data"]
    assert [(one["version"], one["is_current"]) for one in versions] == [(1, False), (2, False), (3, False), (4, True)]
    words = [line.split() for line in run(gateway, "adapters", "versions", name).stdout.splitlines()]
    rows = [line[:2] for line in words if line[1:2] in (["True"], ["False"])]
    assert rows == [["1", "False"], ["2", "False"], ["3", "False"], ["4", "True"]]
    assert told(gateway, "adapters", "rollback", name)["version"] == 3
    assert told(gateway, "adapters", "rollback", name, "1")["version"] == 1
    assert told(gateway, "adapters", "rollback", name, uploaded["adapter_id"][:12])["version"] == 4
    refused = run(gateway, "adapters", "rollback", name, "9")
    assert (refused.exit_code, "no such version" in refused.stderr) == (1, True)
    assert run(gateway, "adapters", "delete", name, "--drain").stdout == f"Deleted {name}.\n"
    assert run(gateway, "adapters", "show", name).exit_code == 1


def test_uploaded_adapter_is_a_tenants_own(gateway: Gateway, tmp_path: Path) -> None:
    name, tenant = f"console-{uuid.uuid4().hex[:8]}", f"console-{uuid.uuid4().hex[:8]}"
    owner = told(gateway, "tenants", "create", tenant)["id"]
    files = write_files(tmp_path / "own", adapter_files(5, size=2**17) | {"README.md": b"not an adapter's"})
    found = told(gateway, "adapters", "validate", str(files), "--upload")
    made = told(gateway, "adapters", "upload", name, str(files), "--tenant", tenant)
    assert (made["tenant_id"], made["state"], made["adapter_id"]) == (owner, "ready", found["adapter_id"])
    again = run(gateway, "adapters", "upload", name, str(files), "--tenant", tenant)
    assert (again.exit_code, "named" in again.stderr) == (1, True), again.stderr
    empty = run(gateway, "adapters", "upload", name, str(tmp_path))
    assert (empty.exit_code, "no directory with files of an adapter" in empty.stderr) == (2, True)


def test_failed_version_says_why_and_is_tried_again(gateway: Gateway) -> None:
    name = f"console-{uuid.uuid4().hex[:8]}"
    source = gateway.adapter_dir / name
    assert "no such directory" in run(gateway, "adapters", "validate", str(source)).stderr
    told(gateway, "adapters", "add", name, str(source), "--no-wait")
    while (shown := told(gateway, "adapters", "show", name))["state"] != "failed":
        time.sleep(0.02)
    [row] = [row for row in run(gateway, "adapters", "list").stdout.splitlines() if name in row]
    assert "no such directory" in row  # whole: who reads it by a program takes it line by line
    write_adapter(source, 44)
    assert "rank=44" in run(gateway, "adapters", "validate", str(source)).stdout
    told(gateway, "adapters", "retry", name, str(shown["version"]))
    while told(gateway, "adapters", "show", name)["state"] != "ready":
        time.sleep(0.02)
    assert run(gateway, "adapters", "retry", name).exit_code == 1


def test_route_by_weight_lives_its_life(gateway: Gateway) -> None:
    name, tenant = f"console-{uuid.uuid4().hex[:8]}", f"console-{uuid.uuid4().hex[:8]}"
    told(gateway, "tenants", "create", tenant)
    made = told(gateway, "routes", "create", name, "team/echo-one=90", "team/echo-one@1=10", "--tenant", tenant)
    assert made["targets"] == [{"model": "team/echo-one", "weight": 90}, {"model": "team/echo-one@1", "weight": 10}]
    listed = run(gateway, "routes", "list", "--tenant", tenant).stdout
    assert "team/echo-one=90, team/echo-one@1=10" in listed
    told(gateway, "routes", "change", name, "team/echo-one=0.5", "--tenant", tenant)
    assert "team/echo-one=0.5" in run(gateway, "routes", "show", name, "--tenant", tenant).stdout
    refused = run(gateway, "routes", "change", name, "nothing=1", "--tenant", tenant)
    assert (refused.exit_code, "nothing" in refused.stderr) == (1, True)
    assert run(gateway, "routes", "delete", name, "--tenant", tenant).stdout == f"Deleted {name}.\n"
    assert told(gateway, "routes", "list", "--tenant", tenant)["data"] == []


@pytest.mark.parametrize(
    ("arguments", "key", "exit_code", "says"),
    [
        (["tenants", "list"], "", 2, "LORAPLEX_ADMIN_KEY"),
        (["tenants", "list"], "wrong", 1, "invalid_api_key"),
        (["tenants", "list", "--url", "ftp://x"], None, 2, "ftp://x"),
        (["tenants", "list", "--url", "http://127.0.0.1:1"], None, 3, "cannot be reached"),
        (["tenants", "show", "nobody"], None, 1, "'nobody'"),
        (["tenants", "show", "tenant_0000000000000000"], None, 1, "tenant_not_found"),
        (["limits", "set", "tests", "max_tokens"], None, 2, "NAME=VALUE"),
        (["limits", "set", "tests", "max_tokens=many"], None, 1, "max_tokens"),
        (["limits", "set", "tests", "max_tolkiens=1"], None, 1, "max_tolkiens"),
        (["keys", "create", "tests", "--expires", "tomorrow"], None, 2, "tomorrow"),
        (["keys", "create", "tests", "--role", "pope"], None, 1, "role"),
        (["usage", "--by", "colour"], None, 1, "group_by"),
        (["routes", "create", "r", "team/echo-one"], None, 2, "MODEL=WEIGHT"),
        (["routes", "create", "r", "team/echo-one=much"], None, 2, "MODEL=WEIGHT"),
        (["routes", "create", "r", "team/echo-one=-1"], None, 1, "targets[0].weight"),
        (["routes", "show", "team/echo-one"], None, 1, "no route"),
        (["adapters", "update", "team/echo-one", "ftp://x"], None, 1, "ftp: is not served"),
        (["adapters", "upload", "new", "/nowhere"], None, 2, "/nowhere"),
        (["nonsense"], None, 2, "nonsense"),
    ],
    ids=str,
)
def test_failure_is_one_line_and_an_exit_code(
    gateway: Gateway, arguments: list[str], key: str | None, exit_code: int, says: str
) -> None:
    done = run(gateway, *arguments, key=key)
    assert (done.exit_code, done.stdout) == (exit_code, ""), done.stderr
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("around", ["[red]{}[/red]", ":cat:{}:1234:"], ids=["markup", "emoji"])
def test_names_are_shown_as_they_are(gateway: Gateway, around: str) -> None:
    name = around.format(uuid.uuid4().hex[:8])
    assert run(gateway, "tenants", "create", name).exit_code == 0
    assert name in run(gateway, "tenants", "list").stdout
    assert name in run(gateway, "tenants", "show", f"{name}?").stderr


def test_no_escape_of_a_name_reaches_the_terminal(gateway: Gateway) -> None:
    name = f"\x9b2J\u202e{uuid.uuid4().hex[:8]}"
    made, taken = (run(gateway, "tenants", "create", name) for _ in range(2))
    listed, as_json = run(gateway, "tenants", "list"), run(gateway, "tenants", "show", name, "--json")
    nobody = run(gateway, "tenants", "show", "tenant_\x1b[2J")
    for done in (made, listed):
        assert r"\x9b2J\u202e" + name[-8:] in done.stdout
    assert json.loads(as_json.stdout)["name"] == name
    assert (taken.exit_code, nobody.exit_code) == (1, 1)
    for done in (made, taken, listed, as_json, nobody):
        assert not set(done.output) & set("\x1b\x9b\u202e"), done.output


def test_no_escape_of_what_a_server_says_reaches_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exit):
        fail(CommandFailed("\x1b[2J\nAll is well. 🐢 ü", 1))
    assert capsys.readouterr().err == "error: \\x1b[2J\\nAll is well. 🐢 ü\n"
    Session(AdminClient("http://localhost", "k"), as_json=False).say("Deleted \x1b[2J.")
    assert capsys.readouterr().out == "Deleted \\x1b[2J.\n"


def test_command_works_in_a_process_of_its_own(gateway: Gateway) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"LORAPLEX_URL": gateway.url, "LORAPLEX_ADMIN_KEY": gateway.admin_key}
    command = [str(Path(sys.executable).parent / "loraplex"), "tenants", "list", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert gateway.tenant_id in [tenant["id"] for tenant in json.loads(done.stdout)["data"]]
