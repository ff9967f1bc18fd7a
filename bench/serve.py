"""Closed-loop load on any OpenAI-compatible server: output tokens/s, TTFT and inter-token latency.

    python bench/serve.py --base-url http://127.0.0.1:8000/v1 --api-key KEY --models a,b,c,d \\
        --concurrency 8 --requests 64 --max-tokens 32 --mix distinct --repeat 3

Each of `--concurrency` clients sends its next request when its last answer is complete. The mix says which model each
request names: `distinct` takes them in turn, `uniform` at random, `zipf` by weights 1/k, `skewed` by 1/k^1.5,
`identical` the first one only. With `--prompt-tokens N`, each prompt is N random token ids (so that no request finds
its beginning in a prefix cache) and goes to /completions; else `--prompt` goes to /chat/completions. Figures are
medians over `--repeat` runs; latencies are in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any

import aiohttp

MIXES = ("distinct", "uniform", "zipf", "identical", "skewed")
PROMPT = "Tell me about the village. Who lives there, and what do they do all day?"


@dataclass(frozen=True)
class Answer:
    """One streamed answer: seconds from sending to each chunk that carried text, and the server's token count."""

    chunk_seconds: tuple[float, ...]
    num_tokens: int


@dataclass(frozen=True)
class Figures:
    """One run. Latencies in ms; throughput in output tokens a second."""

    output_tokens_per_second: float
    ttft_p50: float
    ttft_p99: float
    inter_token_p50: float
    inter_token_p99: float
    num_requests: int
    num_failed: int


def models_of(mix: str, models: list[str], count: int, seed: int) -> Iterator[str]:
    """The model of each request."""
    rng = random.Random(seed)
    if mix == "distinct":
        return islice(cycle(models), count)
    exponent = {"uniform": 0.0, "zipf": 1.0, "skewed": 1.5}.get(mix)
    if exponent is None:
        return iter(models[:1] * count)
    weights = [1 / k**exponent for k in range(1, len(models) + 1)]
    return iter(rng.choices(models, weights, k=count))


async def ask(session: aiohttp.ClientSession, options: argparse.Namespace, model: str, rng: random.Random) -> Answer:
    """Stream one completion. Raises RuntimeError on any error the server reports."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body.update(options.extra.get(model, {}))
    if options.ignore_eos:
        body["ignore_eos"] = True
    if options.prompt_tokens:
        path = "completions"
        body["prompt"] = [rng.randrange(10, options.vocabulary) for _ in range(options.prompt_tokens)]
    else:
        path = "chat/completions"
        body["messages"] = [{"role": "user", "content": options.prompt}]
    began = time.perf_counter()
    times: list[float] = []
    num_tokens = 0
    async with session.post(f"{options.base_url}/{path}", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            if chunk["choices"] and _text(chunk["choices"][0]):
                times.append(time.perf_counter() - began)
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
    return Answer(tuple(times), num_tokens)


def _text(choice: dict[str, Any]) -> str | None:
    """What a chunk of either route adds."""
    text: str | None = choice["delta"].get("content") if "delta" in choice else choice.get("text")
    return text


async def run(options: argparse.Namespace, seed: int) -> Figures:
    """One run of all requests."""
    rng = random.Random(seed)
    queue = models_of(options.mix, options.models.split(","), options.requests, seed)
    answers: list[Answer] = []
    failures: list[str] = []

    async def client(session: aiohttp.ClientSession) -> None:
        for model in queue:
            try:
                answers.append(await ask(session, options, model, rng))
            except (RuntimeError, aiohttp.ClientError) as error:
                failures.append(str(error))

    headers = {"Authorization": f"Bearer {options.api_key}"}
    timeout = aiohttp.ClientTimeout(total=None, sock_read=600)
    connector = aiohttp.TCPConnector(limit=0, force_close=options.hangs_up)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(options.concurrency)))
        seconds = time.perf_counter() - began
    if failures:
        print(f"{len(failures)} failed, the first with: {failures[0]}")
    first = [answer.chunk_seconds[0] * 1e3 for answer in answers if answer.chunk_seconds]
    gaps = [
        (later - earlier) * 1e3
        for answer in answers
        for earlier, later in zip(answer.chunk_seconds, answer.chunk_seconds[1:], strict=False)
    ]
    return Figures(
        output_tokens_per_second=sum(answer.num_tokens for answer in answers) / seconds,
        ttft_p50=quantile(first, 0.50),
        ttft_p99=quantile(first, 0.99),
        inter_token_p50=quantile(gaps, 0.50),
        inter_token_p99=quantile(gaps, 0.99),
        num_requests=len(answers),
        num_failed=len(failures),
    )


def quantile(values: list[float], share: float) -> float:
    """Nearest-rank quantile; NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def medians(runs: list[Figures]) -> Figures:
    columns = {name: [asdict(run)[name] for run in runs] for name in asdict(runs[0])}
    return Figures(**{name: statistics.median(values) for name, values in columns.items()})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True, help="with /v1 at its end")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--models", required=True, help="names, separated by commas")
    parser.add_argument("--mix", choices=MIXES, default="distinct")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--prompt-tokens", type=int, help="random token ids instead of --prompt")
    parser.add_argument("--vocabulary", type=int, default=2000, help="token ids are below this")
    parser.add_argument("--ignore-eos", action="store_true", help="always generate --max-tokens (a vLLM extension)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one line of JSON with machine and commit")
    return parser.parse_args()


def main() -> None:
    options = argparse.Namespace(**vars(parse()), extra={}, hangs_up=False)
    asyncio.run(run(argparse.Namespace(**{**vars(options), "requests": options.concurrency * 2}), seed=0))  # warm-up
    figures = medians([asyncio.run(run(options, seed)) for seed in range(1, options.repeat + 1)])
    if options.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        shown = {k: v for k, v in vars(options).items() if k not in ("api_key", "json")}
        print(json.dumps({**asdict(figures), "options": shown, "machine": platform.processor(), "commit": commit}))
        return
    print(f"{options.mix}, {len(options.models.split(','))} models, {options.concurrency} concurrent requests")
    for name, value in asdict(figures).items():
        print(f"  {name:26} {value:10.1f}")


if __name__ == "__main__":
    main()
