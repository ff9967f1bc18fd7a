"""Servers to put in front of each other: engines over the demo's base, the echo, or a script of answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeAlias

from msgspec.structs import replace
from openai import OpenAI
from support.gateway import Gateway, settings_in
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from loraplex.config.settings import EngineSettings, Model, Settings
from loraplex.config.upstream import UpstreamSettings
from loraplex.engines.build import build_engine
from loraplex.engines.protocol import Engine
from loraplex.engines.upstream.engine import UpstreamEngine

ADMIN_KEY = "an-admin-key-of-the-tests"
KEY_ENV = "LORAPLEX_TEST_UPSTREAM_KEY"
ECHO_EOS = 256
BASE = "the-base"
MOST_ADAPTERS = 2  # at a time at an upstream


@dataclass
class Pair:
    """A gateway whose engine is another server, and that server."""

    front: Gateway
    upstream: Gateway

    def loaded(self) -> set[str]:
        """The adapters that the upstream has for the front."""
        with self.upstream.admin() as admin:
            names = {model["id"] for model in admin.get("/v1/models").json()["data"]}
        return {name for name in names if len(name) == 64}


_clients: dict[str, OpenAI] = {}


def client_of(gateway: Gateway) -> OpenAI:
    if gateway.url not in _clients:
        _clients[gateway.url] = OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0)
    return _clients[gateway.url]


def leave() -> None:
    for client in _clients.values():
        client.close()
    _clients.clear()


def register(gateway: Gateway, name: str, source: Path) -> None:
    with gateway.admin() as admin:
        made = admin.post("/admin/v1/adapters", json={"name": name, "source": str(source)})
        assert made.status_code == 201, made.text


def built(settings: Settings) -> Engine:
    """What `build_engine` gives where this checkout is what is installed."""
    return UpstreamEngine(settings) if settings.engine.kind == "upstream" else build_engine(settings)


def write_echo_base(directory: Path) -> Path:
    """The echo engine's vocabulary as a checkpoint has it: byte b is token b, and behind them the end."""
    directory.mkdir(parents=True, exist_ok=True)
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    vocabulary = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    assert tokenizer.token_to_id("<eos>") == ECHO_EOS
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"vocab_size": 257, "architectures": ["Echo"]}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ECHO_EOS}))
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return directory


def in_front_of(
    url: str, home: Path, base: Path, name: str, engine: dict[str, Any] | None = None, **upstream: Any
) -> Settings:
    """Settings of a gateway whose engine is the server at `url`."""
    options: dict[str, Any] = {"poll_seconds": 0.1, "api_key_env": KEY_ENV, **upstream}
    return replace(
        settings_in(home),
        model=Model(path=str(base), name=name),
        engine=EngineSettings(kind="upstream", **(engine or {})),
        upstream=UpstreamSettings(url=url, **options),
    )


Answer: TypeAlias = Callable[[BaseHTTPRequestHandler, Any], None]


class Script:
    """What a scripted server answers by path, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.answers: dict[str, Answer] = {}
        self.url = ""


def say(status: int, body: bytes | dict[str, Any], kind: str = "application/json") -> Answer:
    """An answer of one piece."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()

    def answer(handler: BaseHTTPRequestHandler, said: Any) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        handler.wfile.write(raw)

    return answer


def stream(*frames: dict[str, Any] | str, then: Callable[[], object] = lambda: None) -> Answer:
    """Server-sent events; `then` is called before the connection is closed."""

    def answer(handler: BaseHTTPRequestHandler, said: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        for frame in frames:
            text = frame if isinstance(frame, str) else json.dumps(frame)
            handler.wfile.write(f"data: {text}\n\n".encode())
        handler.wfile.flush()
        then()

    return answer


@contextmanager
def scripted() -> Iterator[Script]:
    """A server that is healthy, serves one base, and otherwise answers as its script says."""
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            said = json.loads(raw) if raw else None
            script.asked.append((self.path, dict(self.headers), said))
            self.close_connection = True
            answer: Answer = script.answers.get(self.path, say(404, {"detail": "Not Found"}))
            answer(self, said)

        do_GET = do_POST = _answer

        def log_message(self, format: str, *args: Any) -> None: ...

    script.answers["/health"] = say(200, b"", "text/plain")
    script.answers["/v1/models"] = say(200, {"data": [{"id": "base", "owned_by": "vllm", "max_model_len": 512}]})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
