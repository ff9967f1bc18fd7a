"""Thousands of requests of every sort over one engine: each ends exactly once, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.worlds import SmallWorld

from loraplex.config.settings import Adapters
from loraplex.engines.errors import AdapterInvalid, DeadlineExceeded, EngineError, InvalidRequest, PromptTooLong
from loraplex.engines.native.engine import NativeEngine
from loraplex.engines.protocol import Adapter, GenerateRequest, SamplingParams

CONCURRENCY = 32
MAX_CHECKED = 60  # of the greedy answers, one request in twenty
# What the allocator may keep after the first quarter: its arenas fill slowly; one leaked request a hundred would show.
MAX_GROWTH_BYTES = 24 * 2**20


@dataclass
class Soak:
    """Random requests, and how each ended."""

    engine: NativeEngine
    adapters: list[Adapter]
    broken: Adapter
    rng: random.Random
    num_checked: int
    ends: Counter[str] = field(default_factory=Counter)
    greedy: list[tuple[GenerateRequest, list[int]]] = field(default_factory=list)

    async def run(self, numbers: range) -> None:
        remaining = iter(numbers)

        async def client() -> None:
            for number in remaining:
                self.ends[await self._one(number)] += 1

        await asyncio.gather(*(client() for _ in range(CONCURRENCY)))

    async def _one(self, number: int) -> str:
        """One request; the name of its only end. Raises where that is not one it may have."""
        kind = self.rng.choices(
            ["whole", "greedy", "leaves", "too long", "no such token", "broken adapter", "hurried"],
            [50, 12, 20, 5, 5, 4, 4],
        )[0]
        wanted = self._request(number, kind)
        expected: dict[str, type[EngineError]] = {
            "too long": PromptTooLong,
            "no such token": InvalidRequest,
            "broken adapter": AdapterInvalid,
            "hurried": DeadlineExceeded,
        }
        try:
            tokens, reason = await self._read(wanted, self.rng.randint(0, 12) if kind == "leaves" else None)
        except EngineError as error:
            if type(error) is not expected.get(kind):
                raise
            return type(error).__name__
        assert kind in ("whole", "greedy", "leaves", "hurried"), (kind, reason)
        if kind == "greedy" and len(self.greedy) < self.num_checked:
            self.greedy.append((wanted, tokens))
        return reason

    async def _read(self, wanted: GenerateRequest, leave_after: int | None) -> tuple[list[int], str]:
        tokens: list[int] = []
        reasons: list[str] = []
        stream: AsyncIterator[Any] = self.engine.generate(wanted)
        try:
            if leave_after == 0:
                first = asyncio.ensure_future(anext(stream))
                await asyncio.sleep(0)
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
                return [], "left"
            async for event in stream:
                assert not reasons, "an event after the last one"
                tokens += event.token_ids
                reasons += [event.finish_reason] if event.finish_reason else []
                if leave_after is not None and len(tokens) >= leave_after:
                    return tokens, reasons[0] if reasons else "left"
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
        assert len(reasons) == 1
        assert len(tokens) <= wanted.sampling.max_tokens
        return tokens, reasons[0]

    def _request(self, number: int, kind: str) -> GenerateRequest:
        rng = self.rng
        length = 600 if kind == "too long" else rng.randint(1, 40)
        prompt = [rng.randrange(30, 300) for _ in range(length)]
        if kind == "no such token":
            prompt[rng.randrange(length)] = 100_000
        sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": rng.randint(1, 24)}
        if kind != "greedy" and rng.random() < 0.6:
            sampling |= {
                "temperature": rng.uniform(0.2, 1.5),
                "top_p": rng.choice([1.0, 0.9]),
                "top_k": rng.choice([0, 20]),
                "seed": rng.choice([None, 7]),
                "frequency_penalty": rng.choice([0.0, 0.5]),
                "num_logprobs": rng.choice([None, 3]),
                "stop": rng.choice([(), ("e", "th")]),
            }
        return GenerateRequest(
            request_id=str(number),
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(**sampling),
            adapter=self.broken if kind == "broken adapter" else rng.choice([None, *self.adapters]),
            tenant=rng.choice("abc"),
            priority=rng.randint(0, 2),
            timeout_seconds=0.001 if kind == "hurried" else None,
        )


def resident_bytes() -> int:
    """Memory of the engine's process."""
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "engines.native"], capture_output=True, text=True)
    status = Path(f"/proc/{int(found.stdout)}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


@pytest.mark.parametrize(
    "num_requests",
    [160, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])],
)
async def test_every_request_ends_once_and_nothing_is_left(
    small: SmallWorld, tmp_path: Path, num_requests: int
) -> None:
    shutil.copytree(small.adapters["rank-4"].path, tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"none")
    broken = Adapter(id="sha-broken", name="broken", path=str(tmp_path / "broken"))
    many = [
        Adapter(id=f"{adapter.id}-{copy}", name=f"{adapter.name}-{copy}", path=adapter.path)
        for copy in range(8)
        for adapter in small.adapters.values()
    ]
    # Room for some ten of the forty adapters and six of the sixteen sequences: much is evicted and preempted.
    settings = small.settings(kv_cache_bytes=64 * 4 * 3 * 2 * 32 * 4, max_running=16)
    settings = msgspec.structs.replace(settings, adapters=Adapters(device_bytes=2**20))
    engine = NativeEngine(settings)
    await engine.start(lambda progress: None)
    try:
        soak = Soak(engine, many, broken, random.Random(20), min(num_requests // 20, MAX_CHECKED))
        await soak.run(range(num_requests // 4))
        early = resident_bytes()
        await soak.run(range(num_requests // 4, num_requests))
        assert sum(soak.ends.values()) == num_requests
        assert {"stop", "length", "left", "PromptTooLong", "InvalidRequest", "AdapterInvalid"} <= set(soak.ends)
        stats = await engine.stats()  # commands are obeyed in order, so the last aborts are done
        assert (stats.num_running, stats.num_waiting, stats.num_kv_blocks_used, stats.num_restarts) == (0, 0, 0, 0)
        refused = soak.ends["PromptTooLong"] + soak.ends["InvalidRequest"]
        assert stats.total_finished + stats.total_aborted + stats.total_failed + refused == num_requests
        assert stats.total_preemptions > 0
        residency = await engine.residency()
        assert [found.name for found in residency if found.num_requests] == []
        assert 0 < len([found for found in residency if found.tier == "device"]) < len(many)
        assert not engine._worker.is_busy
        assert len(soak.greedy) == soak.num_checked
        originals = {adapter.path: adapter for adapter in small.adapters.values()}  # one oracle for all copies of one
        for wanted, tokens in soak.greedy:
            adapter = originals[wanted.adapter.path] if wanted.adapter else None
            assert tokens == small.oracle.greedy([*wanted.prompt_token_ids], len(tokens), adapter)
        if num_requests >= 10_000:
            growth = resident_bytes() - early
            print(f"{dict(soak.ends)}; {stats.total_preemptions} preemptions, grown by {growth / 2**20:.1f} MiB")
            assert growth < MAX_GROWTH_BYTES
    finally:
        await engine.close()
