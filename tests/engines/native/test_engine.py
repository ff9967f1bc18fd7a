"""The engine behind its process boundary: streams, stop strings, aborts, bad adapters, a killed worker."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import torch
from support.models import AdapterSpec, llama_config, make_adapter, make_model
from support.worlds import SmallWorld

from loraplex.config.settings import Model, Settings
from loraplex.engines.errors import (
    AdapterInvalid,
    AdapterMismatch,
    EngineDied,
    EngineUnavailable,
    InvalidRequest,
    ModelNotServable,
    PromptTooLong,
)
from loraplex.engines.native.engine import NativeEngine
from loraplex.engines.protocol import (
    Adapter,
    EmbedRequest,
    GenerateRequest,
    SamplingParams,
    TokenEvent,
    WeightedAdapter,
)
from loraplex.engines.tokenizer import TemplatedTokenizer

PROMPT = tuple(range(40, 60))


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[NativeEngine]:
    engine = NativeEngine(settings)
    await engine.start(lambda progress: None)
    try:
        yield engine
    finally:
        await engine.close()


@pytest_asyncio.fixture
async def engine(small: SmallWorld) -> AsyncIterator[NativeEngine]:
    async with running(small.settings()) as engine:
        yield engine


def worker_pids() -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "engines.native"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def worker_pid() -> int:
    [pid] = worker_pids()
    return pid


async def is_ready(engine: NativeEngine) -> bool:
    return engine.health().state == "ready"


async def is_restarting(engine: NativeEngine) -> bool:
    return engine.health().state == "restarting"


async def residents_are_known(engine: NativeEngine, number: int) -> bool:
    """Whether a heartbeat has told the engine's own process what is on the device."""
    return len(engine._worker.residents) == number


def request(
    name: str, adapter: Adapter | None = None, prompt: tuple[int, ...] = PROMPT, **sampling: Any
) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 24, "temperature": 0.0, **sampling})
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, adapter=adapter, sampling=params)


async def collect(engine: NativeEngine, wanted: GenerateRequest) -> list[TokenEvent]:
    return [event async for event in engine.generate(wanted)]


def token_ids(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def text(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 100.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


async def test_five_adapters_share_steps_and_match_peft(engine: NativeEngine, small: SmallWorld) -> None:
    adapters = [None, *small.adapters.values()]
    for adapter in adapters[1:]:
        assert adapter is not None
        await engine.load(adapter)
    requests = [request(str(n), adapter, max_tokens=40) for n, adapter in enumerate(adapters)]
    streams = await asyncio.gather(*(collect(engine, wanted) for wanted in requests))
    for adapter, events in zip(adapters, streams, strict=True):
        assert token_ids(events) == small.oracle.greedy(list(PROMPT), 40, adapter)
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1].finish_reason in ("stop", "length")
        assert {event.queue_seconds for event in events} == {events[0].queue_seconds}
        assert 0 < events[0].queue_seconds < 60
    shared = set.intersection(*({event.step for event in events} for events in streams))
    assert len(shared) >= min(len(events) for events in streams) / 2  # the first may begin before the last arrives


async def test_text_is_the_tokenizers_own_decoding(engine: NativeEngine, small: SmallWorld) -> None:
    events = await collect(engine, request("a", max_tokens=60, ignore_eos=True))
    assert text(events) == engine.tokenizer.decode(token_ids(events))


async def test_stop_string_across_tokens_cuts_the_text(engine: NativeEngine) -> None:
    whole = text(await collect(engine, request("whole", max_tokens=40, ignore_eos=True)))
    stop = whole[10:13]
    events = await collect(engine, request("cut", max_tokens=40, ignore_eos=True, stop=(stop, "never there")))
    assert text(events) == whole[: whole.index(stop)]
    assert events[-1].finish_reason == "stop"

    async def idle() -> bool:
        return (await engine.stats()).num_kv_blocks_used == 0

    await until(idle)
    assert (await engine.stats()).total_aborted == 0
    events = await collect(engine, request("late", max_tokens=40, ignore_eos=True, stop=(stop,), min_tokens=40))
    assert text(events) == whole


async def test_closed_stream_frees_blocks_while_a_neighbour_runs_on(engine: NativeEngine) -> None:
    neighbour = asyncio.create_task(collect(engine, request("long", max_tokens=450, ignore_eos=True)))
    leaver = engine.generate(request("leaver", max_tokens=450, ignore_eos=True))
    await anext(leaver)

    async def both_run() -> bool:
        return (await engine.stats()).num_running == 2

    await until(both_run)
    before = await engine.stats()
    await leaver.aclose()
    after = await engine.stats()  # commands are obeyed in order, between steps
    assert after.total_aborted == before.total_aborted + 1
    assert after.num_running == 1
    assert after.num_steps - before.num_steps <= 2
    assert len(token_ids(await neighbour)) == 450
    assert (await engine.stats()).num_kv_blocks_used == 0


async def test_prompt_too_long_raises_before_any_event(engine: NativeEngine) -> None:
    with pytest.raises(PromptTooLong) as caught:
        await collect(engine, request("long", prompt=tuple([65] * 512)))
    assert caught.value.param == "messages"


async def test_broken_adapter_is_its_requests_error_alone(
    engine: NativeEngine, small: SmallWorld, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small.adapters["rank-4"].path, broken)
    weights = (broken / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(weights[:-10])
    adapter = Adapter(id="sha-broken", name="broken", path=str(broken))
    neighbour = asyncio.create_task(collect(engine, request("neighbour", max_tokens=60, ignore_eos=True)))
    with pytest.raises(AdapterInvalid, match=r"adapter_model\.safetensors cannot be read"):
        await engine.inspect(adapter)
    with pytest.raises(AdapterInvalid):
        await collect(engine, request("broken", adapter))
    assert len(token_ids(await neighbour)) == 60


async def test_inspect_adapter_of_another_base_raises_mismatch(engine: NativeEngine, tmp_path: Path) -> None:
    make_model(llama_config(hidden_size=32, num_hidden_layers=2), tmp_path / "other")
    adapter = make_adapter(tmp_path / "other", AdapterSpec("foreign", 4), tmp_path)
    with pytest.raises(AdapterMismatch, match=r"lora_A of model\.layers\.0\.self_attn\.q_proj has shape \[4, 32\]"):
        await engine.inspect(adapter)


async def test_inspect_valid_adapter_reports_it(engine: NativeEngine, small: SmallWorld) -> None:
    card = await engine.inspect(small.adapters["rank-32-dora"])
    assert (card.rank, card.variant, card.num_modules) == (32, "dora", 21)
    assert card.target_modules == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


async def test_killed_worker_fails_requests_in_flight_and_comes_back(engine: NativeEngine, small: SmallWorld) -> None:
    adapter = small.adapters["rank-8"]
    expected = token_ids(await collect(engine, request("before", adapter)))
    stream = engine.generate(request("victim", adapter, max_tokens=450, ignore_eos=True))
    await anext(stream)
    os.kill(worker_pid(), signal.SIGKILL)
    with pytest.raises(EngineDied):
        async for _ in stream:
            pass
    with pytest.raises(EngineUnavailable):
        await collect(engine, request("too early", adapter))

    await until(lambda: is_ready(engine))
    assert token_ids(await collect(engine, request("after", adapter))) == expected
    assert (await engine.stats()).num_restarts == 1


async def test_worker_that_cannot_be_started_at_once_is_started_later(
    engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where for a moment there can be no more processes."""

    async def second_try_has_begun() -> bool:
        return engine._num_restarts == 2

    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        os.kill(worker_pid(), signal.SIGKILL)
        await until(second_try_has_begun, seconds=10.0)
        assert engine.health().state == "restarting"
    await until(lambda: is_ready(engine))
    assert len(token_ids(await collect(engine, request("after", ignore_eos=True)))) == 24


async def test_request_whose_tokenizer_is_read_while_the_worker_dies_is_told(
    engine: NativeEngine, small: SmallWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_asked, may_be_read = asyncio.Event(), asyncio.Event()
    tokenizer_of = engine.tokenizer_of

    async def slowly(adapter: Adapter | None) -> TemplatedTokenizer:
        tokenizer = await tokenizer_of(adapter)
        is_asked.set()
        await may_be_read.wait()
        return tokenizer

    monkeypatch.setattr(engine, "tokenizer_of", slowly)
    asked = asyncio.create_task(collect(engine, request("victim", small.adapters["rank-8"])))
    await is_asked.wait()
    os.kill(worker_pid(), signal.SIGKILL)
    await until(lambda: is_restarting(engine))
    may_be_read.set()
    async with asyncio.timeout(1):
        with pytest.raises(EngineUnavailable, match="restarting"):
            await asked
    await until(lambda: is_ready(engine))


async def test_stopped_worker_is_replaced_and_its_requests_told(small: SmallWorld) -> None:
    async with running(small.settings(unresponsive_seconds=3.0)) as engine:
        stream = engine.generate(request("victim", max_tokens=450, ignore_eos=True))
        await anext(stream)
        os.kill(worker_pid(), signal.SIGSTOP)
        with pytest.raises(EngineDied, match="did not answer for 3 s"):
            async for _ in stream:
                pass
        await until(lambda: is_ready(engine))
        assert len(token_ids(await collect(engine, request("after")))) > 0


async def test_restarted_worker_has_its_predecessors_adapters(engine: NativeEngine, small: SmallWorld) -> None:
    pinned, used, part = (small.adapters[name] for name in ("rank-8", "rank-4", "rank-16-rslora"))
    await engine.pin(pinned, pinned=True)
    composition = (WeightedAdapter(used, 0.5), WeightedAdapter(part, 0.5))
    await collect(engine, msgspec.structs.replace(request("composed"), composition=composition))
    await until(lambda: residents_are_known(engine, 3))
    os.kill(worker_pid(), signal.SIGKILL)

    async def restored() -> bool:
        with suppress(EngineDied, EngineUnavailable):
            has_restarted = (await engine.stats()).num_restarts == 1
            return has_restarted and [found.tier for found in await engine.residency()] == ["device"] * 3
        return False

    await until(restored)
    found = {found.adapter_id: found.pinned for found in await engine.residency()}
    assert found == {pinned.id: True, used.id: False, part.id: False}


async def test_reload_finishes_streams_in_the_old_process_and_begins_new_ones_in_the_new(
    engine: NativeEngine, small: SmallWorld
) -> None:
    """Asked for twice at once, too: one process is left."""
    adapter = small.adapters["rank-32-dora"]
    before = worker_pids()
    expected = token_ids(await collect(engine, request("alone", adapter, max_tokens=400, ignore_eos=True)))
    stream = engine.generate(request("before", adapter, max_tokens=400, ignore_eos=True))
    first = await anext(stream)
    reloading = asyncio.gather(engine.reload(), engine.reload())
    tokens = [*first.token_ids, *[token async for event in stream for token in event.token_ids]]
    await reloading
    assert tokens == expected
    after = token_ids(await collect(engine, request("after", adapter, max_tokens=400, ignore_eos=True)))
    assert after == expected

    async def old_is_gone() -> bool:
        return len(worker_pids()) == 1

    await until(old_is_gone)
    assert worker_pids() != before
    assert (await engine.stats()).num_restarts == 0


async def test_reload_that_is_given_up_leaves_the_engine_as_it_was(engine: NativeEngine) -> None:
    before = worker_pids()
    reloading = asyncio.create_task(engine.reload())

    async def has_begun() -> bool:
        return len(worker_pids()) == 2

    await until(has_begun)
    reloading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reloading
    assert worker_pids() == before
    assert len(token_ids(await collect(engine, request("after", ignore_eos=True)))) == 24


async def test_close_while_reloading_ends_every_process(small: SmallWorld) -> None:
    async with running(small.settings()) as engine:
        reloading = asyncio.create_task(engine.reload())

        async def has_begun() -> bool:
            return len(worker_pids()) == 2

        await until(has_begun)
    assert worker_pids() == []
    with pytest.raises(EngineUnavailable, match="stopping"):
        await reloading
    assert engine.health().state == "draining"


async def test_start_model_missing_raises_not_servable(tmp_path: Path) -> None:
    engine = NativeEngine(Settings(model=Model(path=str(tmp_path), name="none")))
    with pytest.raises(ModelNotServable, match=r"holds no tokenizer\.json"):
        await engine.start(lambda progress: None)
    await engine.close()


async def test_worker_of_another_version_is_told_from_one_that_loads(
    small: SmallWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a new version was installed while the server ran: its worker would wait for words it knows."""
    monkeypatch.setattr("loraplex.engines.native.process.language", lambda: "of the version before")
    engine = NativeEngine(small.settings())
    try:
        with pytest.raises(EngineUnavailable, match=r"of another version of loraplex.*restart the server"):
            await engine.start(lambda progress: None)
    finally:
        await engine.close()
    assert worker_pids() == []


async def test_embedding_crosses_the_process_and_ends_with_it(engine: NativeEngine, small: SmallWorld) -> None:
    def wanted(name: str, prompt: tuple[int, ...] = PROMPT) -> EmbedRequest:
        adapter = small.adapters["rank-32-dora"]
        return EmbedRequest(request_id=name, prompt_token_ids=prompt, adapter=adapter, pooling="last", normalize=False)

    model, ids = small.oracle.model(small.adapters["rank-32-dora"]), torch.tensor([PROMPT])
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1].tolist()
    found = await engine.embed(wanted("one"))
    assert found.request_id == "one"
    assert found.values == pytest.approx(expected, rel=1e-4, abs=1e-4 * max(map(abs, expected)))
    assert engine.info().embedding_width == len(found.values)
    with pytest.raises(InvalidRequest, match="no tokens"):
        await engine.embed(wanted("empty", ()))
    os.kill(worker_pid(), signal.SIGSTOP)
    lost, left = (asyncio.create_task(engine.embed(wanted(name))) for name in ("lost", "left"))
    await asyncio.sleep(0)
    left.cancel()
    os.kill(worker_pid(), signal.SIGKILL)
    with pytest.raises(EngineDied):
        await lost
    with pytest.raises(asyncio.CancelledError):
        await left
    await until(lambda: is_ready(engine))
    again = await engine.embed(wanted("again"))  # by a process that may multiply by another kernel
    assert again.values == pytest.approx(found.values, rel=1e-4, abs=1e-4 * max(map(abs, expected)))
