"""What a streamed token costs between engine and client, beside the least it can cost and beside FastAPI with pydantic.

python bench/wire.py [--streams 256] [--tokens 128] [--step-ms 40] [--requests 2000] [--rounds 3]

Each server runs alone on core 0, the client on core 1. All write the same bytes at the same pace: one token a stream a
step. The figure is the server's CPU time a token, for it is steadier than a clock on a machine that others use; the
ratios compare servers of the same round. `floor` is a bare uvloop protocol that writes ready bytes. Then requests that
do not stream, one after another, through keys, limits and the ledger, against the floor's answer of the same size.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from loraplex.auth.limits.policy import Limits
from loraplex.config.settings import Adapters, Auth, Database, EngineSettings, FileSettings, Model, Server, Settings
from loraplex.gateway.launch import listen, rest_garbage_collection
from loraplex.gateway.server import serve
from loraplex.gateway.services import open_services

MODEL = "echo"
DONE = b"data: [DONE]\n\n"
_TEXT = b'"content":"x"'
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n"


class Load(BaseModel):
    """What one round asks of a server. `step` is in seconds; `home` is a directory of the round's own."""

    streams: int
    tokens: int
    step: float
    requests: int
    home: str = ""


def frame(text: str) -> bytes:
    """The bytes of one token, as the gateway writes them."""
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    head = {"id": "chatcmpl-" + "0" * 24, "object": "chat.completion.chunk", "created": 1800000000, "model": MODEL}
    chunk = {**head, "choices": [choice]}
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


class Floor(asyncio.Protocol):
    """Writes ready bytes; reads no more of a request than whether it streams."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._token = frame("x")
        self._written = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if b'"stream":true' in data:
            self._transport.write(_HEAD % b"text/event-stream" + b"transfer-encoding: chunked\r\n\r\n")
            self._written = 0
            asyncio.get_running_loop().call_later(self._load.step, self._step)
        else:
            body = b"{" + b" " * 500 + b"}"
            head = _HEAD % b"application/json" + b"content-length: %d\r\n\r\n" % len(body)
            self._transport.write(head + body)

    def _step(self) -> None:
        self._written += 1
        is_last = self._written == self._load.tokens
        data = self._token + (DONE if is_last else b"")
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) + (b"0\r\n\r\n" if is_last else b""))
        if not is_last:
            asyncio.get_running_loop().call_later(self._load.step, self._step)


async def run_floor(load: Load, told: Connection) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Floor(load), "127.0.0.1", 0)
    told.send((server.sockets[0].getsockname()[1], ""))
    await server.serve_forever()


class Delta(BaseModel):
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: str | None = None


class Chunk(BaseModel):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]


class Asked(BaseModel):
    model: str
    messages: list[dict[str, str]]
    stream: bool = False
    max_tokens: int | None = None


async def run_fastapi(load: Load, told: Connection) -> None:
    """As most servers of models are written: pydantic in, a pydantic object a token out."""
    app = FastAPI()

    async def tokens() -> AsyncIterator[str]:
        for _ in range(load.tokens):
            await asyncio.sleep(load.step)
            choice = ChunkChoice(index=0, delta=Delta(content="x"))
            chunk = Chunk(id="chatcmpl-" + "0" * 24, created=1800000000, model=MODEL, choices=[choice])
            yield f"data: {chunk.model_dump_json()}\n\n"
        yield DONE.decode()

    async def chat(asked: Asked) -> Any:
        return StreamingResponse(tokens(), media_type="text/event-stream") if asked.stream else {"answer": " " * 500}

    app.post("/v1/chat/completions")(chat)
    listener = uvicorn.Config(app, log_level="error", access_log=False, port=0)
    server = uvicorn.Server(listener)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    told.send((server.servers[0].sockets[0].getsockname()[1], ""))
    await serving


async def run_gateway(load: Load, told: Connection) -> None:
    """The product over the echo engine: keys, limits and the ledger are on."""
    home = Path(load.home)
    settings = Settings(
        model=Model(path=load.home, name=MODEL, max_model_len=4096),
        server=Server(port=0),
        engine=EngineSettings(kind="echo"),
        adapters=Adapters(cache_dir=str(home / "cache")),
        database=Database(url=f"sqlite+aiosqlite:///{home / 'db'}"),
        auth=Auth(pepper_file=str(home / "pepper")),
        files=FileSettings(directory=str(home / "files")),
    )
    with listen(settings) as listener:
        async with open_services(settings) as services:
            services.engine._step_seconds = load.step  # type: ignore[attr-defined]
            limits = Limits(requests_per_minute=10**9, output_tokens_per_minute=10**12, tokens_per_day=2**50)
            tenant = await services.tenants.create_tenant("bench", limits)
            key = await services.tenants.create_key(tenant.id, "bench")

            async def on_ready() -> None:
                rest_garbage_collection()
                told.send((listener.getsockname()[1], key.key))

            await serve(settings, services, listener, services.engine.start(lambda _: None), on_ready)


SERVERS: dict[str, Callable[[Load, Connection], Any]] = {
    "floor": run_floor,
    "gateway": run_gateway,
    "fastapi": run_fastapi,
}


def _serve(name: str, load: Load, told: Connection) -> None:
    os.sched_setaffinity(0, {0})
    uvloop.run(SERVERS[name](load, told))


def request(load: Load, key: str, *, stream: bool) -> bytes:
    """An HTTP request whose prompt the echo engine answers with as many tokens as are wanted."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x" * load.tokens}], "stream": stream,
            "max_tokens": load.tokens if stream else 1}  # fmt: skip
    raw = json.dumps(body, separators=(",", ":")).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {key}\r\n"
    return f"{head}content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw


async def read_stream(port: int, payload: bytes, gaps: list[float]) -> int:
    """Frames of text that came, and the times between reads that brought one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(payload)
    count, before, data = 0, 0.0, b""
    while b"[DONE]" not in data:
        more = await reader.read(2**16)
        assert more, data
        data = data[-len(_TEXT) + 1 :] + more  # a frame may come in two pieces
        found, now = data.count(_TEXT), time.perf_counter()
        if found:
            gaps.append(now - before)
            before = now
        count += found
    writer.close()
    return count


async def read_answers(port: int, payload: bytes, number: int) -> list[float]:
    """Seconds of each of so many requests on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    took = []
    for _ in range(number):
        began = time.perf_counter()
        writer.write(payload)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head.split(b"\r\n")[0], head
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
        await reader.readexactly(int(lengths[0].split(b":")[1]))
        took.append(time.perf_counter() - began)
    writer.close()
    return took


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, of its threads that ended too. Linux counts it in nanoseconds."""
    return time.clock_gettime(~pid << 3 | 2)  # the kernel's number of another process's clock, clock_getcpuclockid(3)


@contextmanager
def serving(name: str, load: Load) -> Iterator[tuple[int, int, str]]:
    """One server alone, for as long as the block: its process, its port, a key. Raises EOFError if it ended at once."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="loraplex-wire-") as home:
        ours, theirs = context.Pipe()
        arguments = name, load.model_copy(update={"home": home}), theirs
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()  # or nobody would learn that the process ended
        try:
            assert ours.poll(90), f"{name} was not ready in time"
            port, key = ours.recv()
            assert process.pid is not None
            yield process.pid, port, key
        finally:
            process.kill()
            process.join()


async def measure_streams(name: str, load: Load) -> dict[str, float]:
    """What its streams cost a server, and how evenly they come."""
    with serving(name, load) as (pid, port, key):
        await read_answers(port, request(load, key, stream=False), 20)
        gaps: list[list[float]] = [[] for _ in range(load.streams)]
        payload = request(load, key, stream=True)
        cpu, began = cpu_seconds(pid), time.perf_counter()
        counts = await asyncio.gather(*(read_stream(port, payload, one) for one in gaps))
        seconds, used = time.perf_counter() - began, cpu_seconds(pid) - cpu
    assert set(counts) == {load.tokens}, set(counts)
    between = sorted(gap for one in gaps for gap in one[1:])
    return {
        "cpu us/token": used / sum(counts) * 1e6,
        "tokens/s": sum(counts) / seconds,
        "p99 gap ms": between[int(len(between) * 0.99)] * 1e3,
    }


async def measure_answers(name: str, load: Load) -> float:
    """Milliseconds of a request that does not stream, at p50; the engine answers at once."""
    with serving(name, load.model_copy(update={"step": 0.0})) as (_, port, key):
        payload = request(load, key, stream=False)
        await read_answers(port, payload, min(200, load.requests))
        return statistics.median(await read_answers(port, payload, load.requests)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--step-ms", type=float, default=40.0)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    os.sched_setaffinity(0, {(os.cpu_count() or 1) - 1})
    load = Load(streams=chosen.streams, tokens=chosen.tokens, step=chosen.step_ms / 1e3, requests=chosen.requests)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in SERVERS}
    single: dict[str, list[float]] = {name: [] for name in SERVERS}
    for _ in range(chosen.rounds):
        for name in SERVERS:
            rounds[name].append(uvloop.run(measure_streams(name, load)))
            single[name].append(uvloop.run(measure_answers(name, load)))
    for name, found in rounds.items():
        figures = {what: statistics.median(one[what] for one in found) for what in found[0]}
        figures["request p50 ms"] = statistics.median(single[name])
        print(f"{name:8}", "  ".join(f"{what} {value:.2f}" for what, value in figures.items()))
    for other in ("floor", "fastapi"):
        ratios = [ours["cpu us/token"] / theirs["cpu us/token"]
                  for ours, theirs in zip(rounds["gateway"], rounds[other], strict=True)]  # fmt: skip
        print(f"CPU a token, gateway / {other}: {statistics.median(ratios):.2f}")
    added = [ours - theirs for ours, theirs in zip(single["gateway"], single["floor"], strict=True)]
    print(f"added to a request that does not stream: {statistics.median(added):.2f} ms at p50")


if __name__ == "__main__":
    main()
