"""The console script: settings checked, signals obeyed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
from support.command_line import ADMIN_KEY, LORAPLEX, free_port, serving_at, write_config


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LORAPLEX, *arguments], capture_output=True, text=True, timeout=60)


@contextmanager
def serving(home: Path, drain_seconds: int = 10) -> Iterator[tuple[subprocess.Popen[str], httpx.Client, str]]:
    """(the process, a client with the admin key, a tenant's key)"""
    with serving_at(home, free_port(), drain_seconds=drain_seconds) as (process, client):
        tenant = client.post("/admin/v1/tenants", json={"name": "t"}).json()["id"]
        yield process, client, client.post(f"/admin/v1/tenants/{tenant}/keys", json={}).json()["key"]


def read_stream(client: httpx.Client, key: str, begun: threading.Event, into: list[bytes]) -> None:
    """A stream of about three seconds."""
    body = {"model": "echo-base", "stream": True, "messages": [{"role": "user", "content": "<slow>" + "x" * 50}]}
    headers = {"Authorization": f"Bearer {key}"}
    try:
        with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            for chunk in response.iter_bytes():
                into.append(chunk)
                begun.set()
    except httpx.HTTPError:
        into.append(b"(cut)")


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("[server]\nport = 1", "loraplex.toml"),  # a table twice
        ("max_rnak = 3", "max_rnak"),
        ("max_rank = 0", "max_rank"),
        ("max_rank = 'many'", "max_rank"),
    ],
)
def test_check_config_wrong_names_file_and_setting(tmp_path: Path, extra: str, says: str) -> None:
    done = run("check-config", str(write_config(tmp_path, extra=extra)))
    assert done.returncode == 2
    shown = done.stderr.replace("\n", "")
    assert says in shown
    assert "loraplex.toml" in shown
    assert "Traceback" not in done.stderr


def test_check_config_prints_every_setting(tmp_path: Path) -> None:
    done = run("check-config", str(write_config(tmp_path)))
    assert done.returncode == 0
    assert '"max_batch_tokens": 512' in done.stdout


def test_check_config_never_shows_a_password(tmp_path: Path) -> None:
    path = write_config(tmp_path, extra='[limits]\nredis_url = "redis://:hush@cache:6379/0"')
    lines = [
        'url = "postgresql+asyncpg://loraplex:hush@db/loraplex"' if line.startswith("url =") else line
        for line in path.read_text().splitlines()
    ]
    path.write_text("\n".join(lines))
    done = run("check-config", str(path))
    assert done.returncode == 0, done.stderr
    assert "postgresql+asyncpg://loraplex:***@db/loraplex" in done.stdout
    assert "redis://:***@cache:6379/0" in done.stdout
    assert "hush" not in done.stdout + done.stderr


def test_check_config_url_of_no_database_is_told(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace("sqlite+aiosqlite:///", "nonsense "))
    done = run("check-config", str(path))
    assert done.returncode == 2
    assert "database.url" in done.stderr


def test_check_config_unknown_engine_and_missing_model_are_told(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace('kind = "echo"', 'kind = "warp"'))
    assert "'warp'" in run("check-config", str(path)).stderr
    path.write_text(path.read_text().replace('kind = "warp"', 'kind = "native"'))
    assert "config.json" in run("check-config", str(path)).stderr


@pytest.mark.parametrize("directory", ["[/red]", "[red]", "a directory with a name " + "so long " * 15])
def test_check_config_shows_paths_as_they_are(tmp_path: Path, directory: str) -> None:
    path = tmp_path / directory / "missing.toml"
    done = run("check-config", str(path))
    assert done.returncode == 2
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "setting"),
    [
        ('test.db"', 'loraplex.toml/test.db"', "database.url"),
        ("sqlite+aiosqlite:///", "nonsense+driver://", "database.url"),
        ("sqlite+aiosqlite:///", "postgresql+asyncpg://someone:a-secret@127.0.0.1:1", "database.url"),
        ('pepper"', 'loraplex.toml/pepper"', "auth.pepper_file"),
        ('cache"', 'loraplex.toml/cache"', "adapters.cache_dir"),
        ("[adapters]", '[adapters]\nupload_dir = "/dev/null/uploads"', "adapters.upload_dir"),
        ('files"', 'loraplex.toml/files"', "files.directory"),
    ],
)
def test_serve_what_cannot_be_opened_is_named(tmp_path: Path, old: str, new: str, setting: str) -> None:
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace(old, new))
    done = run("serve", "--config", str(path))
    assert done.returncode == 2, done.stderr
    assert setting in done.stderr
    assert "Traceback" not in done.stderr
    assert "a-secret" not in done.stderr


@pytest.mark.parametrize("command", [["serve", "--config"], ["check-config"]], ids=["serve", "check-config"])
def test_admin_key_that_could_be_guessed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("LORAPLEX_ADMIN_KEY", "short")
    done = run(*command, str(write_config(tmp_path)))
    assert done.returncode == 2
    assert "LORAPLEX_ADMIN_KEY is too short" in done.stderr
    assert "'short'" not in done.stderr
    assert not (tmp_path / "test.db").exists()


def test_serve_authorities_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace("[adapters]", '[adapters]\nhttps_ca_file = "/nowhere.pem"'))
    done = run("serve", "--config", str(path))
    assert done.returncode == 2
    assert "adapters.https_ca_file" in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_port_taken_is_a_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = run("serve", "--config", str(write_config(tmp_path, port)))
    assert done.returncode == 2
    says = f"cannot listen on 127.0.0.1:{port}: another program listens there; stop it, or choose another port"
    assert done.stderr == f"error: {says}\n"


def test_demo_address_of_nobody_is_a_clear_error() -> None:
    done = run("demo", "--host", "192.0.2.1", "--port", "1234")
    assert (done.returncode, done.stderr) == (
        2, "error: cannot listen on 192.0.2.1:1234: Cannot assign requested address\n",
    )  # fmt: skip


def test_version_is_the_packages() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"loraplex {version('loraplex')}\n")


def test_serve_sigterm_lets_streams_finish(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, client, key):
        begun, received = threading.Event(), list[bytes]()
        reader = threading.Thread(target=read_stream, args=(client, key, begun, received))
        reader.start()
        assert begun.wait(10)
        process.send_signal(signal.SIGTERM)
        reader.join(20)
        assert b"".join(received).endswith(b"data: [DONE]\n\n")
        assert process.wait(20) == 0


def test_serve_sigterm_ends_streams_that_outlast_the_drain_with_an_error(tmp_path: Path) -> None:
    with serving(tmp_path, drain_seconds=1) as (process, client, key):
        begun, received = threading.Event(), list[bytes]()
        reader = threading.Thread(target=read_stream, args=(client, key, begun, received))
        reader.start()
        assert begun.wait(10)
        process.send_signal(signal.SIGTERM)
        reader.join(20)
        assert process.wait(20) == 0
        frames = b"".join(received).split(b"\n\n")
        assert frames[-1] == b""
        assert b'"error":{"message":' in frames[-2]
        assert b"[DONE]" not in b"".join(received)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_serve_refuses_new_connections_while_it_drains(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, client, key):
        begun, received = threading.Event(), list[bytes]()
        reader = threading.Thread(target=read_stream, args=(client, key, begun, received))
        reader.start()
        assert begun.wait(10)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{client.base_url}/health")
        reader.join(20)
        assert b"".join(received).endswith(b"data: [DONE]\n\n")


def test_serve_log_of_a_run_holds_no_key(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, client, key):
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}x"}).status_code == 401
        body = {"model": "echo-base", "messages": [{"role": "user", "content": "<fail>......"}]}
        headers = {"Authorization": f"Bearer {key}"}
        assert client.post("/v1/chat/completions", json=body, headers=headers).status_code == 500
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=20)
    assert "this request was asked to fail" in error
    for secret in (key, key.split("-")[3], ADMIN_KEY, "Bearer"):
        assert secret not in out + error


def test_serve_log_holds_no_escapes(tmp_path: Path) -> None:
    files = f'[files]\ndirectory = "{tmp_path / "files"}"'
    with serving_at(tmp_path, free_port(), f'preload = ["\\u001b[2J\\nforged"]\n{files}') as (process, _):
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=20)
    assert r"WARNING adapters.preload: \x1b[2J\nforged: " in error
    assert "\x1b" not in error


def test_serve_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, client, key):
        begun, received = threading.Event(), list[bytes]()
        reader = threading.Thread(target=read_stream, args=(client, key, begun, received))
        reader.start()
        assert begun.wait(10)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        reader.join(20)
        assert b"[DONE]" not in b"".join(received)  # which the first one alone would have waited for


def test_serve_first_start_prints_an_admin_key_once(tmp_path: Path) -> None:
    shown = []
    for _ in range(2):
        port = free_port()
        process = subprocess.Popen(
            [LORAPLEX, "serve", "--config", str(write_config(tmp_path, port))],
            env={name: value for name, value in os.environ.items() if name != "LORAPLEX_ADMIN_KEY"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:  # it listens before it can answer
                time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=20)
        assert process.returncode == 0, error
        shown.append((out, error))
    assert "ak-loraplex-" in shown[0][0]
    assert "ak-loraplex-" not in shown[0][1] + shown[1][0] + shown[1][1]


def test_serve_first_start_that_fails_has_shown_the_admin_key(tmp_path: Path) -> None:
    """No later start would: the database knows it by then."""
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace('kind = "echo"', 'kind = "native"'))
    environment = {name: value for name, value in os.environ.items() if name != "LORAPLEX_ADMIN_KEY"}
    command = [LORAPLEX, "serve", "--config", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "tokenizer.json" in done.stderr.replace("\n", "")
    assert "ak-loraplex-" in done.stdout


def test_serve_random_weights_needs_a_shape_only(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "llama", "vocab_size": 64, "max_position_embeddings": 64, **sizes}
    shape = tmp_path / "shape" / "config.json"
    shape.parent.mkdir()
    shape.write_text(json.dumps(config))
    path = write_config(tmp_path, port := free_port())
    path.write_text(
        path.read_text().replace('kind = "echo"', 'kind = "native"\nnum_threads = 1\nkv_cache_bytes = 65536')
    )
    command = [LORAPLEX, "serve", "--config", str(path), "--random-weights", str(shape)]
    environment = {**os.environ, "LORAPLEX_ADMIN_KEY": ADMIN_KEY}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
            assert when_ready(client, process).status_code == 200
            tenant = client.post("/admin/v1/tenants", json={"name": "t"}).json()["id"]
            key = client.post(f"/admin/v1/tenants/{tenant}/keys", json={}).json()["key"]
            body = {"model": "echo-base", "prompt": "w1 w2 w3", "max_tokens": 4, "ignore_eos": True}
            answer = client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
            assert answer.json()["usage"] == answer.json()["usage"] | {"prompt_tokens": 3, "completion_tokens": 4}
    finally:
        process.kill()
        process.wait()


def when_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> httpx.Response:
    """The first answer that says so, or the last one before the process ended."""
    while process.poll() is None:
        try:
            if (answer := client.get("/health")).status_code == 200:
                return answer
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("the server ended")
