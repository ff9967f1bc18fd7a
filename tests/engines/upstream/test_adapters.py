"""Adapters at an upstream: loaded when they are asked for, each once, idle ones leaving, and again when forgotten."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from safetensors.torch import load_file, save_file
from support.gateway import Gateway, wait_running, write_adapter
from support.upstream import MOST_ADAPTERS, Pair, client_of

from loraplex.config.demo import ADAPTERS_DIR
from loraplex.engines.adapters.config import read_config
from loraplex.engines.errors import AdapterInvalid, AdapterTooLarge
from loraplex.engines.protocol import Adapter, AdapterUse
from loraplex.engines.upstream.card import card_of


def said(client: OpenAI, model: str, prompt: str = "hi") -> str:
    return client.completions.create(model=model, prompt=prompt, max_tokens=100).choices[0].text


def id_of(gateway: Gateway, name: str) -> str:
    with gateway.admin() as admin:
        models = admin.get("/v1/models").json()["data"]
    return next(str(model["adapter"]["id"]) for model in models if model["id"] == name)


def unload_there(pair: Pair, adapter_id: str) -> None:
    with pair.upstream.admin() as admin:
        assert admin.post("/v1/unload_lora_adapter", json={"lora_name": adapter_id}).status_code == 200


def num_loads(pair: Pair, adapter_id: str) -> int:
    """By the upstream's own records."""
    with pair.upstream.admin() as admin:
        entries = admin.get("/admin/v1/audit", params={"limit": 1000}).json()["data"]
    return sum(entry["action"] == "load_lora_adapter" and adapter_id in entry["object"] for entry in entries)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_adapter_is_loaded_under_the_hash_of_its_content(echo: Pair) -> None:
    adapter_id = id_of(echo.front, "rank-1")
    assert said(client_of(echo.front), "rank-1") == f"{adapter_id}: hi"
    assert adapter_id in echo.loaded()


def test_idle_adapters_make_room_the_longest_unused_first(echo: Pair) -> None:
    client, ids = client_of(echo.front), {rank: id_of(echo.front, f"rank-{rank}") for rank in (1, 2, 3)}
    for rank in (1, 2, 1, 3):
        assert said(client, f"rank-{rank}") == f"{ids[rank]}: hi"
    assert echo.loaded() == {ids[1], ids[3]}


def test_adapter_in_use_stays_and_the_next_waits_for_it(echo: Pair) -> None:
    """Two requests hold the two places there are; a third adapter is loaded as soon as one of them is over."""
    client, ids = client_of(echo.front), [id_of(echo.front, f"rank-{rank}") for rank in (1, 2, 3)]
    with ThreadPoolExecutor(3) as pool:
        long = [pool.submit(said, client, f"rank-{rank}", "<slow>") for rank in (1, 2)]
        until(lambda: echo.front.stats().num_running == 2)
        third = pool.submit(said, client, "rank-3")
        until(lambda: echo.front.stats().num_waiting == 1)
        assert echo.loaded() == set(ids[:2])
        assert [one.result() for one in long] == [f"{adapter_id}: <slow>" for adapter_id in ids[:2]]
        assert third.result() == f"{ids[2]}: hi"


def test_adapter_that_many_ask_for_at_once_is_loaded_once(echo: Pair) -> None:
    client, adapter_id = client_of(echo.front), id_of(echo.front, "rank-4")
    assert [said(client, f"rank-{rank}")[-2:] for rank in (1, 2)] == ["hi", "hi"]
    num_before = num_loads(echo, adapter_id)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: said(client, "rank-4"), range(8)))
    assert answers == [f"{adapter_id}: hi"] * 8
    assert num_loads(echo, adapter_id) == num_before + 1


def test_adapter_that_the_upstream_forgot_is_loaded_again(echo: Pair) -> None:
    client, adapter_id = client_of(echo.front), id_of(echo.front, "rank-1")
    assert said(client, "rank-1") == f"{adapter_id}: hi"
    unload_there(echo, adapter_id)
    assert said(client, "rank-1") == f"{adapter_id}: hi"
    assert adapter_id in echo.loaded()


def test_adapter_that_another_gateway_loaded_is_used(echo: Pair) -> None:
    client, adapter_id = client_of(echo.front), id_of(echo.front, "rank-4")
    said(client, "rank-4")
    files = echo.front.services.store.place(adapter_id)
    for rank in (1, 2):
        said(client, f"rank-{rank}")  # the front has forgotten the other
    with echo.upstream.admin() as admin:
        loaded = admin.post("/v1/load_lora_adapter", json={"lora_name": adapter_id, "lora_path": str(files)})
        assert loaded.status_code == 200, loaded.text
    assert said(client, "rank-4") == f"{adapter_id}: hi"


def test_pinned_adapter_does_not_leave(echo: Pair) -> None:
    client = client_of(echo.front)
    with echo.front.admin() as admin:
        assert admin.patch("/admin/v1/adapters/rank-1", json={"pinned": True}).status_code == 200
        until(lambda: id_of(echo.front, "rank-1") in echo.loaded())
        for rank in (2, 3, 4):
            said(client, f"rank-{rank}")
        assert echo.loaded() == {id_of(echo.front, "rank-1"), id_of(echo.front, "rank-4")}
        assert admin.patch("/admin/v1/adapters/rank-1", json={"pinned": False}).status_code == 200
    for rank in (2, 3):
        said(client, f"rank-{rank}")
    until(lambda: id_of(echo.front, "rank-1") not in echo.loaded())


def test_residency_says_what_is_loaded_and_whose_requests_use_it(echo: Pair) -> None:
    client, adapter_id = client_of(echo.front), id_of(echo.front, "rank-2")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(said, client, "rank-2", "<slow>")
        wait_running(echo.front)
        residency = echo.front.services.engine.residency()
        rows = asyncio.run_coroutine_threadsafe(residency, echo.front.loop).result(10)
        assert asked.result() == f"{adapter_id}: <slow>"
    found = {row.adapter_id: row for row in rows}
    assert found[adapter_id].num_requests == found[adapter_id].num_running == 1
    assert found[adapter_id].uses == (AdapterUse(echo.front.tenant_id, "rank-2", 1),)
    assert set(found) == echo.loaded()


def test_more_adapters_than_there_is_room_for_all_answer(demo: Pair) -> None:
    """Over a model: three adapters in turn, at the same time, with room for two."""
    assert MOST_ADAPTERS == 2
    names = ("pirate", "json", "spanish") * 3
    asked: dict[str, Any] = {"prompt": "Anna works at", "temperature": 0.0, "max_tokens": 12}
    front = client_of(demo.front)
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: front.completions.create(model=name, **asked), names))
    expected = {name: client_of(demo.upstream).completions.create(model=name, **asked) for name in names}
    assert [one.choices[0].text for one in answers] == [expected[name].choices[0].text for name in names]
    assert len({one.choices[0].text for one in expected.values()}) == 3


def test_upstream_that_refuses_an_adapter_is_quoted(demo: Pair) -> None:
    """The files are an adapter's, of another model: the gateway takes them, who computes does not."""
    source = write_adapter(demo.front.adapter_dir / "foreign")
    with demo.front.admin() as admin:
        assert admin.post("/admin/v1/adapters", json={"name": "foreign", "source": str(source)}).status_code == 201
    with pytest.raises(BadRequestError, match="the upstream: ") as refused:
        said(client_of(demo.front), "foreign")
    assert refused.value.code in ("adapter_invalid", "adapter_unsupported")


def test_card_is_read_off_the_files(tmp_path: Path) -> None:
    path = ADAPTERS_DIR / "pirate"
    card = card_of(Adapter(id="x", name="pirate", path=str(path)), max_rank=64)
    config = read_config(path)
    assert card.rank == config.rank
    assert set(card.target_modules) == set(config.target_modules)
    assert card.num_modules > 0
    assert card.num_bytes < (path / "adapter_model.safetensors").stat().st_size
    named = tmp_path / "named"
    named.mkdir()
    (named / "adapter_config.json").write_bytes((path / "adapter_config.json").read_bytes())
    tensors = load_file(path / "adapter_model.safetensors")
    state = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    save_file(state, named / "adapter_model.safetensors")
    assert card_of(Adapter(id="x", name="pirate", path=str(named)), max_rank=64) == card
    with pytest.raises(AdapterTooLarge, match=f"rank {card.rank} exceeds"):
        card_of(Adapter(id="x", name="pirate", path=str(path)), max_rank=card.rank - 1)
    with pytest.raises(AdapterInvalid, match=r"adapter_config\.json cannot be read"):
        card_of(Adapter(id="x", name="none", path=str(tmp_path)), max_rank=64)
