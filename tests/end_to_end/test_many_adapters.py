"""More adapters than the device and the host have room for, through the gateway: every answer is its own adapter's."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from support.adapter_files import write_files
from support.gateway import Gateway, running, settings_in
from support.random_adapters import ALL_LINEAR, num_parameters, random_adapter
from support.worlds import SmallWorld

from loraplex.config.settings import Adapters
from loraplex.engines.protocol import Adapter

ADMIN_KEY = "an-admin-key-of-the-tests"
NUM_ADAPTERS, NUM_REQUESTS, NUM_TOKENS, ROOM = 60, 150, 8, 8
RANKS = (4, 8, 16, 8, 32, 4, 64, 8, 16, 32)
PROMPTS = ("Once upon a time", "and then", "xyz")


def rank_of(number: int) -> int:
    return RANKS[number % len(RANKS)]


def tier(gateway: Gateway, name: str) -> Any:
    return next(one for one in gateway.stats().tiers if one.tier == name)


@pytest.mark.slow
def test_zipf_traffic_over_sixty_adapters_with_room_for_eight(
    small: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", ADMIN_KEY)
    native = small.settings()
    sources = tmp_path / "sources"
    for number in range(NUM_ADAPTERS):
        write_files(sources / f"a{number}", random_adapter(small.directory, rank_of(number), number, ALL_LINEAR))
    total = 4 * sum(num_parameters(small.directory, rank_of(number), ALL_LINEAR) for number in range(NUM_ADAPTERS))
    room = total * ROOM // NUM_ADAPTERS
    settings = msgspec.structs.replace(
        settings_in(tmp_path),
        model=native.model,
        engine=native.engine,
        adapters=Adapters(
            cache_dir=str(tmp_path / "cache"), local_roots=(str(sources),), device_bytes=room, host_bytes=2 * room
        ),
    )
    with running(settings, ADMIN_KEY) as gateway, ThreadPoolExecutor(6) as pool, gateway.admin() as admin:

        def register(number: int) -> None:
            made = admin.post("/admin/v1/adapters", json={"name": f"a{number}", "source": str(sources / f"a{number}")})
            assert made.status_code == 201, made.text

        def ask(wanted: tuple[int, str]) -> httpx.Response:
            parameters = {"adapter_id": f"a{wanted[0]}", "max_new_tokens": NUM_TOKENS, "details": True}
            return admin.post("/generate", json={"inputs": wanted[1], "parameters": parameters})

        list(pool.map(register, range(NUM_ADAPTERS)))
        rng = random.Random(0)
        weights = [1 / place for place in range(1, NUM_ADAPTERS + 1)]
        numbers = rng.choices(rng.sample(range(NUM_ADAPTERS), NUM_ADAPTERS), weights, k=NUM_REQUESTS)
        wanted = [(number, rng.choice(PROMPTS)) for number in numbers]
        answers = list(pool.map(ask, wanted))
        assert [answer.text for answer in answers if answer.status_code != 200] == []
        device, host = tier(gateway, "device"), tier(gateway, "host")
        tokenizer = gateway.services.engine.tokenizer
        told: dict[tuple[int, str], list[int]] = {
            key: [token["id"] for token in answer.json()["details"]["tokens"]]
            for key, answer in zip(wanted, answers, strict=True)
        }
        prompts = {prompt: list(tokenizer.encode(prompt)) for prompt in PROMPTS}
    assert device.num_bytes <= room < total
    assert device.total_hits + device.total_misses == NUM_REQUESTS
    assert min(device.total_hits, device.total_misses, device.total_evictions, host.total_evictions) > 0
    assert len({tuple(tokens) for tokens in told.values()}) > len(told) / 2, "adapters do not show in the answers"
    for number, prompt in rng.sample(sorted(told), 12):
        adapter = Adapter(id=f"a{number}", name=f"a{number}", path=str(sources / f"a{number}"))
        assert small.oracle.agrees(prompts[prompt], told[number, prompt], NUM_TOKENS, adapter), (number, prompt)
