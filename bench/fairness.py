"""Tenants beside one another on one live gateway with the demo's model: shares of a full one, and a quiet one's TTFT.

    python bench/fairness.py --seconds 30 --rounds 40

First two tenants of weights 1 and 3 each keep `--saturating` requests open; printed are the generated tokens of each in
`--seconds` (after `--warm-up` of the same), and their ratio. Then a quiet tenant asks `--rounds` times alone, one
streamed request after another, and as often while a noisy tenant keeps `--noisy` requests open; printed is the time to
its first token either way, and how many times longer it is beside the others. Every prompt is of random token ids, so
that none finds its beginning in a prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import uvloop

from loraplex.auth.limits.policy import Limits
from loraplex.gateway.demo import BASE_NAME, demo_settings
from loraplex.gateway.launch import listen
from loraplex.gateway.server import serve
from loraplex.gateway.services import open_services

WEIGHTS = {"one": 1.0, "three": 3.0, "quiet": 1.0, "noisy": 1.0}
VOCABULARY = range(10, 1500)  # of the 1,536 of the demo


async def run_server() -> None:
    """Serve until SIGTERM; prints its port and the tenants' keys once it can."""
    with demo_settings("127.0.0.1", 0) as settings, listen(settings) as listener:
        async with open_services(settings) as services:
            keys = {}
            for name, weight in WEIGHTS.items():
                tenant = await services.tenants.create_tenant(name, Limits(weight=weight))
                keys[name] = (await services.tenants.create_key(tenant.id, name)).key

            async def on_ready() -> None:
                print(json.dumps({"port": listener.getsockname()[1], "keys": keys}), flush=True)

            await serve(settings, services, listener, services.engine.start(lambda _: None), on_ready)


class Tenant:
    """A tenant's client, and the tokens that were generated for it."""

    def __init__(self, url: str, key: str, seed: str) -> None:
        timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
        headers = {"Authorization": f"Bearer {key}"}
        self._session = aiohttp.ClientSession(url, headers=headers, timeout=timeout, connector=connector)
        self._chance = random.Random(seed)
        self.num_tokens = 0

    @asynccontextmanager
    async def busy(self, num_open: int, options: argparse.Namespace) -> AsyncIterator[None]:
        """Keeps so many requests open until the block ends."""
        tasks = [asyncio.create_task(self._ask_for_ever(options)) for _ in range(num_open)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for error in (end for end in ends if isinstance(end, Exception)):
            raise error

    async def first_token_seconds(self, options: argparse.Namespace) -> float:
        """From sending a request to the first text of its streamed answer."""
        body = self._body(options.quiet_prompt_tokens, 4) | {"stream": True}
        began = time.perf_counter()
        found = None
        async with self._session.post("/v1/completions", json=body) as answer:
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    frame = json.loads(line[6:])
                    if "error" in frame:
                        raise RuntimeError(str(frame["error"]))
                    found = found or time.perf_counter() - began
        if found is None:
            raise RuntimeError(f"the gateway answered {answer.status} and no token")
        return found

    async def close(self) -> None:
        await self._session.close()

    async def _ask_for_ever(self, options: argparse.Namespace) -> None:
        while True:
            prompt = self._chance.randint(8, options.max_prompt_tokens)
            body = self._body(prompt, self._chance.randint(8, options.max_tokens))
            async with self._session.post("/v1/completions", json=body) as answer:
                told = await answer.json()
                if answer.status != 200:
                    raise RuntimeError(f"{answer.status}: {told}")
                self.num_tokens += told["usage"]["completion_tokens"]

    def _body(self, num_prompt_tokens: int, max_tokens: int) -> dict[str, Any]:
        prompt = self._chance.choices(VOCABULARY, k=num_prompt_tokens)
        return {"model": BASE_NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


async def shares(tenants: dict[str, Tenant], options: argparse.Namespace) -> None:
    one, three = tenants["one"], tenants["three"]
    async with one.busy(options.saturating, options), three.busy(options.saturating, options):
        await asyncio.sleep(options.warm_up)
        before = one.num_tokens, three.num_tokens
        await asyncio.sleep(options.seconds)
        had = one.num_tokens - before[0], three.num_tokens - before[1]
    print(f"weights 1 and 3, {options.saturating} requests open each, {options.seconds:g} s")
    print(f"  tokens {had[0]} and {had[1]}, 1 : {had[1] / max(had[0], 1):.2f}, {sum(had) / options.seconds:.0f}/s")


async def first_tokens(tenants: dict[str, Tenant], options: argparse.Namespace) -> None:
    quiet, noisy = tenants["quiet"], tenants["noisy"]
    chance = random.Random(0)

    async def measure() -> list[float]:
        found = []
        for _ in range(options.rounds):
            await asyncio.sleep(chance.uniform(0, 0.2))
            found.append(await quiet.first_token_seconds(options) * 1e3)
        return sorted(found)

    await quiet.first_token_seconds(options)  # warms up
    alone = await measure()
    async with noisy.busy(options.noisy, options):
        await asyncio.sleep(options.warm_up)
        beside = await measure()
    print(f"first token of {options.quiet_prompt_tokens} prompt tokens, {options.rounds} requests, ms")
    for name, times in (("alone", alone), (f"beside {options.noisy}", beside)):
        high = times[min(int(0.9 * len(times)), len(times) - 1)]
        print(f"  {name:12} p50 {statistics.median(times):7.1f}  p90 {high:7.1f}  most {times[-1]:7.1f}")
    print(f"  p50 is {statistics.median(beside) / statistics.median(alone):.2f} times as long")


async def measure_all(port: int, keys: dict[str, str], options: argparse.Namespace) -> None:
    tenants = {name: Tenant(f"http://127.0.0.1:{port}", key, name) for name, key in keys.items()}
    try:
        await shares(tenants, options)
        await first_tokens(tenants, options)
    finally:
        for tenant in tenants.values():
            await tenant.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="of saturation that count")
    parser.add_argument("--warm-up", type=float, default=5, help="seconds of load before anything counts")
    parser.add_argument("--saturating", type=int, default=128, help="open requests of each of the two tenants")
    parser.add_argument("--noisy", type=int, default=500, help="open requests beside the quiet tenant's one")
    parser.add_argument("--rounds", type=int, default=40, help="requests of the quiet tenant, alone and beside others")
    parser.add_argument("--quiet-prompt-tokens", type=int, default=128)
    parser.add_argument("--max-prompt-tokens", type=int, default=64, help="of the others, at random from 8")
    parser.add_argument("--max-tokens", type=int, default=64, help="of the others' answers, at random from 8")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        uvloop.run(run_server())
        return
    environment = {**os.environ, "LORAPLEX_ADMIN_KEY": "an-admin-key-of-the-benchmark"}
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise RuntimeError("the gateway did not start")
        asyncio.run(measure_all(**json.loads(line), options=options))
    finally:
        server.terminate()
        server.communicate()


if __name__ == "__main__":
    main()
