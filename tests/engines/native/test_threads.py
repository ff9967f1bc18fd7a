"""How many threads a forward pass uses: by what steps take with each number, and what is left to the gateway."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from loraplex.engines.native import threads
from loraplex.engines.native.threads import choose_num_threads, num_cores

V2, V1_QUOTA, V1_PERIOD = "cpu.max", "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    usual = torch.get_num_threads()
    yield
    torch.set_num_threads(usual)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1, vocab_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("cores", "milliseconds", "expected"),
    [
        (2, {1: 11.0, 2: 8.0}, 2),
        (2, {1: 0.68, 2: 0.54}, 1),  # the gateway's part of a core takes more than the thread gives
        (8, {1: 0.68, 2: 0.54, 4: 0.50}, 2),
        (8, {1: 40.0, 2: 20.0, 4: 10.0, 8: 9.5}, 4),
        (8, {1: 40.0, 2: 20.0, 4: 10.0, 8: 5.0}, 8),
        (6, {1: 40.0, 2: 20.0, 4: 10.0, 6: 7.0}, 6),
        (2, {1: 10.0, 2: 9.5}, 1),
        (1, {1: 10.0}, 1),
    ],
)
def test_threads_are_doubled_while_steps_are_served_faster(
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    milliseconds: dict[int, float],
    expected: int,
) -> None:
    monkeypatch.setattr(threads, "num_cores", lambda: cores)
    monkeypatch.setattr(threads, "_step_seconds", lambda model, num, *, replays: milliseconds[num] / 1e3)
    torch.set_num_threads(cores)
    assert choose_num_threads(model) == expected
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize("replays", [False, True])
def test_measured_steps_leave_a_number_within_bounds(model: PreTrainedModel, replays: bool) -> None:
    torch.set_num_threads(2)
    assert 1 <= choose_num_threads(model, replays=replays) <= 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({V2: "max 100000"}, 8),
        ({V2: "200000 100000"}, 2),
        ({V2: "150000 100000"}, 2),
        ({V2: "50000 100000"}, 1),
        ({V2: "6400000 100000"}, 8),
        ({V2: "nonsense"}, 8),
        ({V1_QUOTA: "-1", V1_PERIOD: "100000"}, 8),
        ({V1_QUOTA: "300000", V1_PERIOD: "100000"}, 3),
    ],
    ids=["none", "v2 max", "v2", "v2 broken", "v2 less than one", "v2 beyond", "v2 nonsense", "v1 none", "v1"],
)
def test_cores_are_bounded_by_the_containers_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert num_cores(tmp_path) == expected
