"""What fits: containers' limits, checkpoints' sizes, and the message where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.worlds import SmallWorld

from loraplex.engines.errors import ModelNotServable
from loraplex.engines.native import memory
from loraplex.engines.native.loading import load_machine
from loraplex.engines.native.memory import free_bytes, require_room_for_weights, weight_bytes
from loraplex.engines.native.model import choose_device

CPU = torch.device("cpu")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8000 * 1024),
        ({"memory.max": "max", "memory.current": "5"}, 8000 * 1024),
        ({"memory.max": "3000000", "memory.current": "1000000"}, 2_000_000),
        ({"memory.max": "3000", "memory.current": "1000", "memory.stat": "anon 5\ninactive_file 700"}, 2_700),
        ({"memory/memory.limit_in_bytes": "3000", "memory/memory.usage_in_bytes": "1000"}, 2_000),
        ({"memory.max": "1000", "memory.current": "3000"}, 0),
    ],
    ids=["no cgroup", "no limit", "v2", "v2 with file cache", "v1", "beyond its limit"],
)
def test_free_bytes_is_what_machine_and_container_leave(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    write(tmp_path / "meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    for name, text in files.items():
        write(tmp_path / name, text)
    assert free_bytes(CPU, cgroup=tmp_path, meminfo=tmp_path / "meminfo") == expected


def test_weight_bytes_counts_every_file_in_the_type_it_will_have(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(10, 10), "scale": torch.zeros(8, dtype=torch.uint8)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(6, dtype=torch.float8_e4m3fn)}, tmp_path / "model-2.safetensors")
    assert weight_bytes(tmp_path, None) == 400 + 8 + 6
    assert weight_bytes(tmp_path, torch.bfloat16) == 200 + 8 + 6


def test_weights_that_do_not_fit_are_refused_with_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3999)
    with pytest.raises(ModelNotServable, match=r"take 0\.0 GiB in memory, and 0\.0 GiB are free on cpu"):
        require_room_for_weights(tmp_path, None, CPU)
    require_room_for_weights(tmp_path, torch.bfloat16, CPU)


def test_kv_cache_that_does_not_fit_beside_the_weights_is_refused(small: SmallWorld) -> None:
    with pytest.raises(ModelNotServable, match="a KV cache of 1125899906842624 bytes do not fit beside the weights"):
        load_machine(small.settings(kv_cache_bytes=2**50), lambda progress: None)


@pytest.mark.parametrize("num_threads", [1, None], ids=["given", "measured"])
def test_kv_cache_bytes_hold_as_many_tokens_however_threads_are_chosen(
    small: SmallWorld, num_threads: int | None
) -> None:
    token_bytes = 3 * 2 * 32 * 4  # layers, keys and values, two heads of 16, float32
    usual = torch.get_num_threads()
    try:
        settings = small.settings(kv_cache_bytes=40 * 4 * token_bytes, num_threads=num_threads)
        assert load_machine(settings, lambda progress: None).num_kv_blocks == 40
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1"])
def test_device_that_torch_does_not_find_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    choose_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if name == "cuda:1":
        with pytest.raises(ModelNotServable, match=r"model\.device = 'cuda:1': torch .* finds 1 CUDA devices here"):
            choose_device(name)
    else:
        choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelNotServable, match=f"'{name}': torch .* finds 0"):
        choose_device(name)
    choose_device("auto")
    choose_device("cpu")
