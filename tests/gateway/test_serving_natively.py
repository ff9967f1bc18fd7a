"""The console script over the native engine's process: how both start, fail to start, and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.command_line import ADMIN_KEY, LORAPLEX, free_port, write_config

SHAPE = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 8192,
}  # fmt: skip


def begin(home: Path, port: int = 0, device: str = "cpu", **changes: Any) -> subprocess.Popen[str]:
    """Random weights of a shape, in a process group of their own."""
    shape = home / "shape" / "config.json"
    shape.parent.mkdir(exist_ok=True)
    shape.write_text(json.dumps(SHAPE | changes))
    path = write_config(home, port, drain_seconds=60)
    text = path.read_text().replace('name = "echo-base"', f'name = "base"\ndevice = "{device}"')
    path.write_text(text.replace('kind = "echo"', 'kind = "native"\nnum_threads = 1\nkv_cache_bytes = 4194304'))
    return subprocess.Popen(
        [LORAPLEX, "serve", "--config", str(path), "--random-weights", str(shape)],
        env={**os.environ, "LORAPLEX_ADMIN_KEY": ADMIN_KEY}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_ready(client: httpx.Client, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "sigint"])
def test_signal_to_the_whole_group_lets_streams_finish(tmp_path: Path, number: signal.Signals) -> None:
    process = begin(tmp_path, port := free_port())
    try:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
            wait_ready(client, process)
            body = {"model": "base", "prompt": "w1", "max_tokens": 1000, "ignore_eos": True, "stream": True}
            received = b""
            with client.stream("POST", "/v1/completions", json=body) as response:
                for chunk in response.iter_bytes():
                    if not received:
                        os.killpg(process.pid, number)
                    received += chunk
        assert received.endswith(b"data: [DONE]\n\n"), received[-300:]
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def test_engine_ends_with_a_server_that_is_killed(tmp_path: Path) -> None:
    """Though it does not end by the signals that the server obeys."""
    process = begin(tmp_path, port := free_port())
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_ready(client, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        engines = [pid for pid in children if b"loraplex.engines.native" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(engines) == 1
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while Path(f"/proc/{engines[0]}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("device", "broken", "says"),
    [
        ("cuda:99", {}, "model.device = 'cuda:99': torch "),
        ("cpu", {"file": "cut off"}, "model.safetensors cannot be read"),
        ("cpu", {"num_attention_heads": 0}, "ZeroDivisionError"),
    ],
    ids=["no such device", "file cut off", "what nobody foresaw"],
)
def test_start_that_fails_says_why_in_its_last_line(
    tmp_path: Path, device: str, broken: dict[str, Any], says: str
) -> None:
    if broken.pop("file", None):
        (tmp_path / "shape").mkdir()
        (tmp_path / "shape" / "model.safetensors").write_bytes((2**20).to_bytes(8, "little") + b"{")
    process = begin(tmp_path, device=device, **broken)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2, error
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: "), error
    assert says in last
    assert "restarted" not in error
    assert "Fatal Python error" not in error
    assert error.count("Traceback") == ("ZeroDivisionError" in says)
