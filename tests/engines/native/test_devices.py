"""A base that lies on a device other than the CPU, or than the first one, as far as can be seen without any."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import replace

import msgspec
import pytest
import torch
from support.core import make_core, prompt_of, request, run, tokens
from support.elsewhere import Elsewhere
from support.worlds import SmallWorld

from loraplex.config.settings import Settings
from loraplex.engines.adapters.arena import Arena
from loraplex.engines.errors import ModelNotServable
from loraplex.engines.native import loading
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.loading import load_machine

SECOND = torch.device("cuda:1")


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.device]]:
    """What threads make their device, by their names; there seem to be two."""
    made: dict[str, list[torch.device]] = defaultdict(list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made[threading.current_thread().name].append(device))
    return made


def on_device(small: SmallWorld, name: str) -> Settings:
    settings = small.settings()
    return msgspec.structs.replace(settings, model=msgspec.structs.replace(settings.model, device=name))


def test_dora_of_a_base_elsewhere_gives_the_tokens_of_peft(small: SmallWorld) -> None:
    core, adapter, prompt = make_core(small), small.adapters["rank-32-dora"], prompt_of(1, 5)
    base = core.adapters._base
    core.adapters._base = replace(
        base,
        weight=lambda index: Elsewhere(base.weight(index).detach()),
        parameter=lambda name: Elsewhere(base.parameter(name).detach()),
    )
    core.submit(request("dora", prompt, adapter, max_tokens=6))
    [found] = run(core).values()
    assert [emission.error for emission in found if emission.error] == []
    assert tokens(found) == small.oracle.greedy(prompt, 6, adapter)


def test_loading_makes_the_named_device_its_threads_before_it_is_touched(
    small: SmallWorld, devices: dict[str, list[torch.device]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(*arguments: object) -> None:
        assert devices == {threading.current_thread().name: [SECOND]}
        raise InterruptedError

    monkeypatch.setattr(loading, "require_room_for_weights", touch)
    with pytest.raises(InterruptedError):
        load_machine(on_device(small, "cuda:1"), lambda progress: None)


def test_threads_that_read_adapters_have_the_device_of_the_base(
    small: SmallWorld, devices: dict[str, list[torch.device]], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = load_machine(small.settings(), lambda progress: None)
    reading, all_read = set(), threading.Barrier(2)

    def weight(index: int) -> torch.Tensor:
        name = threading.current_thread().name
        if name not in reading:
            reading.add(name)
            all_read.wait(timeout=30.0)
        return machine.base.weight(index)

    monkeypatch.setattr(Arena, "device", SECOND)
    core = EngineCore(replace(machine, base=replace(machine.base, weight=weight)))
    adapter = small.adapters["rank-32-dora"]
    for number in range(2):
        twin = msgspec.structs.replace(adapter, id=f"twin-{number}", name=f"twin-{number}")
        core.submit(request(str(number), prompt_of(number, 4), twin, max_tokens=1))
    assert all(emission.error is None for found in run(core).values() for emission in found)
    assert len(reading) == 2
    assert devices == {name: [SECOND] for name in reading}


@pytest.mark.parametrize(
    ("name", "reason"),
    [("cuda:2", r"torch .* finds 2 CUDA devices here"), ("gpu", "is none that torch knows")],
    ids=["beyond the last", "unknown"],
)
def test_device_that_is_not_there_is_refused_by_name(
    small: SmallWorld, devices: dict[str, list[torch.device]], name: str, reason: str
) -> None:
    with pytest.raises(ModelNotServable, match=f"model.device = '{name}'.* {reason}"):
        load_machine(on_device(small, name), lambda progress: None)
    assert not devices
