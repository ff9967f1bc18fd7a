"""Thousands of registered adapters on the demo's base: what registering them costs, and zipf traffic through them.

    python bench/many_adapters.py            # --quick for a smoke test, which judges no speed

Two gateways of their own: one registers a single adapter, the other `--registered`. Both answer the same requests for
that one adapter, in turns, `--rounds` times, which gives the ratio of their throughputs.

Then the second one registers on, up to `--adapters`, ranks mixed, with room for `--room` mean ones on the device and
six times as many on the host. `--requests` requests, `--clients` at a time, name them by weights 1/k. Each answer by
`--sample` of the adapters is compared with what transformers and PEFT generate from the same files. What /metrics says
of the tiers is printed.

Status 1 where a request failed, an answer is wrong, or the ratio is below 0.95.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from served import Served, serve_demo
from support.adapter_files import write_files
from support.models import Oracle
from support.random_adapters import num_parameters, random_adapter
from transformers import AutoTokenizer

from loraplex.config.demo import EXAMPLE_PROMPTS, MODEL_DIR
from loraplex.engines.protocol import Adapter

MIN_RATIO = 0.95
RANKS = (4, 8, 16, 8, 32, 4, 64, 8, 16, 128)
ITEMSIZE = 4  # the demo is served in float32
TIERS = ("device", "host", "disk")


@dataclass(frozen=True)
class Answer:
    """One request's: `number` is the adapter's."""

    number: int
    prompt: str
    token_ids: list[int]


@dataclass(frozen=True)
class Load:
    """What came back of some requests. `failures` are told in full."""

    answers: list[Answer]
    failures: list[str]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(len(answer.token_ids) for answer in self.answers) / self.seconds


async def drive(served: Served, numbers: Sequence[int], options: argparse.Namespace) -> Load:
    """A closed loop of `--clients` over requests that name these adapters."""
    answers: list[Answer] = []
    failures: list[str] = []
    queue = iter([(number, EXAMPLE_PROMPTS[place % len(EXAMPLE_PROMPTS)]) for place, number in enumerate(numbers)])

    async def client(session: aiohttp.ClientSession) -> None:
        for number, prompt in queue:
            parameters = {"adapter_id": f"a{number}", "max_new_tokens": options.tokens, "details": True}
            body = {"inputs": prompt, "parameters": parameters}
            async with session.post(f"{served.url}/generate", json=body) as response:
                told = await response.json()
                if response.status == 200:
                    answers.append(Answer(number, prompt, [token["id"] for token in told["details"]["tokens"]]))
                else:
                    failures.append(f"a{number}: {response.status}: {told}")

    headers = {"Authorization": f"Bearer {served.api_key}"}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=600)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(options.clients)))
        return Load(answers, failures, time.perf_counter() - began)


def register(served: Served, directory: Path, numbers: Sequence[int]) -> None:
    """Four at a time; prints how long the first and the last hundred took."""
    times: list[float] = []
    with served.admin() as admin, ThreadPoolExecutor(4) as pool:

        def one(number: int) -> None:
            body = {"name": f"a{number}", "source": str(directory / f"a{number}")}
            admin.post("/admin/v1/adapters", json=body).raise_for_status()
            times.append(time.perf_counter())

        began = time.perf_counter()
        list(pool.map(one, numbers))
    some = min(100, len(numbers))
    first, last = sorted(times)[some - 1] - began, times[-1] - sorted(times)[-some]
    print(f"registered {len(numbers)} in {times[-1] - began:.1f} s; the first {some} took {first:.1f} s, "
          f"the last {some} {last:.1f} s")  # fmt: skip


def compare(one: Served, many: Served, options: argparse.Namespace) -> tuple[float, list[str]]:
    """Throughput with many registered over that with one, and what failed."""
    speeds: dict[str, list[float]] = {"1": [], str(options.registered): []}
    failures = []
    for number in range(options.rounds + 1):
        for name, served in zip(speeds, (one, many), strict=True):
            load = asyncio.run(drive(served, [0] * options.load, options))
            failures += load.failures
            speeds[name] += [load.tokens_per_second] if number else []  # the first round warms up
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    for name, found in speeds.items():
        print(f"  {name:>5} registered {medians[name]:8.1f} tokens/s   ({', '.join(f'{v:.0f}' for v in found)})")
    ratio = medians[str(options.registered)] / medians["1"]
    print(f"  ratio {ratio:.3f} (target >= {MIN_RATIO})")
    return ratio, failures


def visit(served: Served, options: argparse.Namespace) -> Load:
    """The zipf traffic; prints what the tiers made of it."""
    rng = random.Random(0)
    order = rng.sample(range(options.adapters), options.adapters)  # so that the frequent ones are of every rank
    weights = [1 / place for place in range(1, options.adapters + 1)]
    before = served.metrics()
    load = asyncio.run(drive(served, rng.choices(order, weights, k=options.requests), options))
    after = served.metrics()
    distinct = len({answer.number for answer in load.answers})
    print(f"zipf: {options.requests} requests for {distinct} of {options.adapters} adapters, "
          f"{len(load.failures)} failed, {load.tokens_per_second:.1f} tokens/s")  # fmt: skip
    for tier in TIERS:
        hits, misses, evictions = (
            after[f"loraplex_tier_{name}_total", tier] - before[f"loraplex_tier_{name}_total", tier]
            for name in ("hits", "misses", "evictions")
        )
        held = {name: after[f"loraplex_tier_{name}", tier] for name in ("adapters", "bytes", "capacity_bytes")}
        rate = hits / (hits + misses) if hits + misses else float("nan")
        print(f"  {tier:6} hits {hits:6.0f}  misses {misses:6.0f}  hit rate {rate:5.3f}  evictions {evictions:6.0f}; "
              f"{held['adapters']:.0f} adapters, {held['bytes'] / 2**20:.1f} of "
              f"{held['capacity_bytes'] / 2**20:.1f} MiB")  # fmt: skip
    return load


def wrong(load: Load, directory: Path, options: argparse.Namespace) -> list[str]:
    """The answers of a sample of adapters that are not what transformers and PEFT say; prints how many were asked."""
    rng = random.Random(1)
    sample = rng.sample(sorted({answer.number for answer in load.answers}), options.sample)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    found, checked, plain = [], 0, 0
    for number in sample:
        oracle = Oracle(MODEL_DIR)  # a new one for each adapter: it keeps every model that it has loaded
        adapter = Adapter(id=f"a{number}", name=f"a{number}", path=str(directory / f"a{number}"))
        for prompt, told in {(one.prompt, tuple(one.token_ids)) for one in load.answers if one.number == number}:
            checked += 1
            prompt_ids = tokenizer(prompt).input_ids
            plain += list(told) == oracle.greedy(prompt_ids, options.tokens, None)
            if not oracle.agrees(prompt_ids, list(told), options.tokens, adapter):
                found.append(f"a{number}: {prompt!r} -> {told}")
    print(f"{checked} different answers by {len(sample)} adapters against transformers and PEFT: {len(found)} wrong "
          f"({plain} are as the base's)")  # fmt: skip
    return found


def look(served: Served, options: argparse.Namespace) -> None:
    """Print how long what lists the adapters takes."""
    with served.admin() as admin:
        for path in ("/metrics", "/v1/models", "/admin/v1/adapters"):
            print(f"  GET {path}: {1e3 * _seconds(partial(admin.get, path)):.0f} ms")


def _seconds(work: Callable[[], object]) -> float:
    """The median of five."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--registered", type=int, default=1000)
    parser.add_argument("--room", type=int, default=50)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--load", type=int, default=200, help="requests of one round of the comparison")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--sample", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few of everything, judged by errors and tokens alone")
    options = parser.parse_args()
    if options.quick:
        options.adapters, options.registered, options.room, options.requests = 60, 30, 8, 200
        options.load, options.sample, options.rounds = 32, 4, 1
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as home:
        sys.exit(0 if _run(Path(home), options) else 1)


def _run(home: Path, options: argparse.Namespace) -> bool:
    directory = home / "adapters"
    for number in range(options.adapters):
        write_files(directory / f"a{number}", random_adapter(MODEL_DIR, RANKS[number % len(RANKS)], number))
    mean = statistics.mean(num_parameters(MODEL_DIR, rank) for rank in RANKS) * ITEMSIZE
    adapters: dict[str, Any] = {"device_bytes": int(options.room * mean), "host_bytes": int(6 * options.room * mean)}
    adapters["local_roots"] = [str(directory)]
    (home / "one").mkdir()
    (home / "many").mkdir()
    with serve_demo(home / "many", adapters=adapters) as many:
        with serve_demo(home / "one", adapters=adapters) as one:
            register(one, directory, [0])
            register(many, directory, range(options.registered))
            ratio, failures = compare(one, many, options)
        register(many, directory, range(options.registered, options.adapters))
        load = visit(many, options)
        look(many, options)
    failures += load.failures
    mistakes = wrong(load, directory, options)
    for told in [*failures[:5], *mistakes[:5]]:
        print(told)
    return not failures and not mistakes and (options.quick or ratio >= MIN_RATIO)


if __name__ == "__main__":
    main()
