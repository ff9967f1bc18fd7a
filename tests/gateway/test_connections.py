"""Clients that send too slowly, too much, or nonsense: refused within bounds, and nobody else notices."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import random
import select
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from support.gateway import BASE, Gateway, running, settings_in
from support.problems import assert_problem

CHAT = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "x"}]}).encode()


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway of little patience."""
    home = tmp_path_factory.mktemp("strict")
    bounds = {"header_timeout_seconds": 0.5, "body_timeout_seconds": 0.5, "max_header_bytes": 4096}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
        with running(settings_in(home, **bounds), "k") as gateway:
            gateway.tenant_id, gateway.api_key = gateway.new_tenant("tests")
            yield gateway


def connect(gateway: Gateway) -> socket.socket:
    host, port = gateway.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


class Answer(NamedTuple):
    status: int
    content: Any


def read_answer(connection: socket.socket) -> Answer:
    """The next answer, of a connection that may go on."""
    response = http.client.HTTPResponse(_Unclosed(connection), method="POST")  # type: ignore[arg-type]
    response.begin()
    return Answer(response.status, json.loads(response.read()))


class _Unclosed:
    """A socket whose file reads no more than it is asked for, so that nothing of the next answer is lost."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def makefile(self, *_: object) -> Any:
        return self._connection.makefile("rb", buffering=0)


def head(gateway: Gateway, length: int, *more: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", f"authorization: Bearer {gateway.api_key}", *more]
    return "\r\n".join([*lines, f"content-length: {length}", "", ""]).encode()


def serves(gateway: Gateway) -> bool:
    with gateway.client() as client:
        return client.post("/v1/chat/completions", content=CHAT).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET /health HTTP/1.1\r\nhost: x\r\n", b"G"])
def test_head_that_does_not_end_is_408(strict: Gateway, sent: bytes) -> None:
    with connect(strict) as connection:
        connection.sendall(sent)
        received = answer(connection)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_slow_heads_by_the_hundred_hold_nobody_up_and_are_all_let_go(strict: Gateway) -> None:
    """A byte now and then earns a head no time."""
    connections = [connect(strict) for _ in range(200)]
    try:
        for connection in connections:
            connection.sendall(b"GET /health HTTP/1.1\r\nx: ")
        assert serves(strict)
        for connection in connections:
            try:
                connection.sendall(b"y")
            except OSError:
                continue
        assert all(answer(connection)[:13] in (b"HTTP/1.1 408 ", b"") for connection in connections)
    finally:
        for connection in connections:
            connection.close()
    assert serves(strict)


def test_slow_body_is_408_and_costs_nothing(strict: Gateway) -> None:
    with connect(strict) as connection:
        connection.sendall(head(strict, len(CHAT)) + CHAT[:5])
        assert answer(connection).startswith(b"HTTP/1.1 408 ")
    assert strict.stats().num_running == 0


def test_second_request_of_a_connection_has_bounds_of_its_own(strict: Gateway) -> None:
    with connect(strict) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        first = b""
        while not first.endswith(b"}"):  # its head and its body may come apart
            first += connection.recv(65536)
        assert first.startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert answer(connection).startswith(b"HTTP/1.1 408 ")


def test_answer_that_takes_longer_than_the_bounds_is_not_cut(strict: Gateway) -> None:
    with strict.client() as client:
        body = {"model": BASE, "messages": [{"role": "user", "content": "<slow>" + "x" * 25}]}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
            assert stream.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("form", ["one header", "many headers", "endless header", "long path"])
def test_head_too_large_is_431(strict: Gateway, form: str) -> None:
    sent = {
        "one header": head(strict, 0, "x: " + "y" * 5000),
        "many headers": head(strict, 0, *(f"x-{number}: y" for number in range(500))),
        "endless header": b"GET /health HTTP/1.1\r\nx: " + b"y" * 5000,
        "long path": b"GET /" + b"p" * 5000 + b" HTTP/1.1\r\n\r\n",
    }[form]
    with connect(strict) as connection:
        connection.sendall(sent)
        received = answer(connection)
    assert received.startswith(b"HTTP/1.1 431 ")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"
    assert serves(strict)


def test_body_said_too_large_is_413_before_it_is_sent(strict: Gateway) -> None:
    with connect(strict) as connection:
        connection.sendall(head(strict, 2**40))
        assert b" 413 " in connection.recv(65536).partition(b"\r\n")[0]


def test_nonsense_is_400_or_refused_and_never_a_500(strict: Gateway) -> None:
    chance = random.Random(7)
    base = head(strict, len(CHAT)) + CHAT
    statuses = set()
    for _ in range(150):
        sent = bytearray(base)
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(sent))
            sent[at : at + chance.choice((0, 1, 3))] = chance.randbytes(chance.choice((0, 1, 2, 40)))
        with connect(strict) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            status = answer(connection)[9:12]
        statuses.add(status)
    assert not [status for status in statuses if status.startswith(b"5") and status != b"505"], statuses
    assert b"400" in statuses
    assert serves(strict)


@pytest.mark.parametrize(
    "value",
    ["Bearer " + "\xff" * 20, "Bearer a b c", "bearer\t", "Bearer " + "x" * 3000, "Bearer sk-loraplex-\u00e9", "\x7f"],
)
def test_odd_authorization_headers_are_401(strict: Gateway, value: str) -> None:
    with connect(strict) as connection:
        lines = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: "
        connection.sendall(lines + value.encode("latin-1") + b"\r\n\r\n")
        status = answer(connection)[9:12]
    assert status in (b"401", b"400"), status
    assert serves(strict)


@pytest.mark.parametrize("size", [40_000, 200_000, 900_000])
def test_body_larger_than_a_head_may_be_is_no_head(strict: Gateway, size: int) -> None:
    """In one piece with its head, and in pieces of which the last one is larger than a head may be."""
    body = {"model": BASE, "messages": [{"role": "user", "content": "x" * size}]}
    with strict.client() as client:
        for _ in range(3):
            refused = client.post("/v1/chat/completions", json=body)
            assert_problem(refused, 400, "context_length_exceeded", "messages")


CHUNKED = "transfer-encoding: chunked"
WHOLE = b"%x\r\n%s\r\n0\r\n\r\n" % (len(CHAT), CHAT)
UPGRADE = ("connection: Upgrade, HTTP2-Settings", "http2-settings: AAMAAABkAARAAAAAAAIAAAAA")


def said(gateway: Gateway, body: bytes, *more: str, line: str = "POST /v1/chat/completions HTTP/1.1") -> bytes:
    """A request with just these headers, beside a key."""
    lines = [line, "host: x", f"authorization: Bearer {gateway.api_key}", *more, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def length(body: bytes) -> str:
    return f"content-length: {len(body)}"


FRAMED: dict[str, tuple[bytes, tuple[str, ...], int]] = {
    "chunks": (WHOLE, (CHUNKED,), 200),
    "chunk extension and trailer": (WHOLE.replace(b"\r\n", b";a=b\r\n", 1)[:-2] + b"x: y\r\n\r\n", (CHUNKED,), 200),
    "chunk shorter than it says": (WHOLE.replace(b"%x" % len(CHAT), b"%x" % (len(CHAT) + 4), 1), (CHUNKED,), 400),
    "chunk longer than it says": (WHOLE.replace(b"%x" % len(CHAT), b"%x" % (len(CHAT) - 4), 1), (CHUNKED,), 400),
    "chunk of no number": (b"zz\r\n" + CHAT, (CHUNKED,), 400),
    "chunk of a negative size": (b"-5\r\n" + CHAT, (CHUNKED,), 400),
    "chunk beyond 64 bits": (b"f" * 18 + b"\r\n" + CHAT, (CHUNKED,), 400),
    "chunks and a length": (WHOLE, (CHUNKED, "content-length: 5"), 400),
    "unknown coding": (WHOLE, ("transfer-encoding: xchunked",), 400),
    "length too small": (CHAT, ("content-length: 10", "connection: close"), 400),
    "length negative": (CHAT, ("content-length: -5",), 400),
    "length signed": (CHAT, ("content-length: +5",), 400),
    "length in hex": (CHAT, ("content-length: 0x10",), 400),
    "length beyond 64 bits": (CHAT, (f"content-length: {10**30}",), 400),
    "two lengths": (CHAT, (length(CHAT), "content-length: 5"), 400),
    "asked to go on": (CHAT, (length(CHAT), "expect: 100-continue"), 200),
    "compressed": (gzip.compress(CHAT), (length(gzip.compress(CHAT)), "content-encoding: gzip"), 415),
    "said to be identity": (CHAT, (length(CHAT), "content-encoding: identity"), 200),
    "offer of HTTP/2": (CHAT, (length(CHAT), "upgrade: h2c", *UPGRADE), 200),
    "offer of a websocket": (CHAT, (length(CHAT), "upgrade: websocket", *UPGRADE), 200),
    "offer before chunks": (WHOLE, (CHUNKED, "upgrade: h2c", *UPGRADE), 200),
    "invalid UTF-8 in a header": (CHAT, (length(CHAT), "x: \xff\xfe"), 200),
    "NUL in a header": (CHAT, (length(CHAT), "x: a\0b"), 400),
    "header without a colon": (CHAT, (length(CHAT), "nonsense"), 400),
    "host of no port": (CHAT, (length(CHAT), "host: x:99999999"), 200),
}


@pytest.mark.parametrize("name", FRAMED)
def test_body_is_read_as_it_is_framed_or_refused(strict: Gateway, name: str, caplog: pytest.LogCaptureFixture) -> None:
    body, more, status = FRAMED[name]
    sent = said(strict, body, *more)
    if name.startswith("host"):
        sent = sent.replace(b"host: x\r\n", b"")
    with connect(strict) as connection:
        connection.sendall(sent)
        found = read_answer(connection)
    assert found.status == status, found
    if status >= 400:
        assert found.content["error"]["message"]
    else:
        assert found.content["choices"][0]["message"]["content"] == "x"
    assert strict.stats().num_running == 0
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("POST http://elsewhere.example/v1/chat/completions HTTP/1.1", 200),
        ("POST /v1/chat/completions HTTP/1.0", 200),
        ("POST /v1/chat/completions HTTP/0.9", 505),
        ("POST /v1/chat/completions HTTP/2.0", 505),
        ("POST /v1/chat/completions HTTP/9.9", 400),
        ("PRI * HTTP/2.0", 400),
        ("CONNECT elsewhere.example:443 HTTP/1.1", 405),
        ("BREW /v1/chat/completions HTTP/1.1", 400),
        ("PUT /v1/chat/completions HTTP/1.1", 405),
        ("POST v1/chat/completions HTTP/1.1", 400),
        ("POST /v1/chat/completions\xff HTTP/1.1", 400),
        ("POST /v1/chat/completions%ff HTTP/1.1", 404),
        ("POST /v1/chat/completions%00 HTTP/1.1", 404),
        ("POST /v1/chat/completions\0 HTTP/1.1", 400),
        ("POST /v1/chat completions HTTP/1.1", 400),
    ],
)
def test_request_line_odd_is_answered_or_refused(
    strict: Gateway, line: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(strict) as connection:
        connection.sendall(said(strict, CHAT, length(CHAT), line=line))
        found = read_answer(connection)
    assert found.status == status, found
    assert status == 200 or found.content["error"]["message"]
    assert caplog.records == []


def stream_of(gateway: Gateway, version: str, *more: str) -> tuple[list[bytes], bytes]:
    """The head's lines of a stream that ends with its connection, and everything behind it."""
    body = CHAT.replace(b'"model"', b'"stream": true, "model"').replace(b'"x"', b'"<slow>"')
    with connect(gateway) as connection:
        connection.sendall(said(gateway, body, length(body), *more, line=f"POST /v1/chat/completions HTTP/{version}"))
        head, _, rest = answer(connection).partition(b"\r\n\r\n")
    return head.lower().split(b"\r\n"), rest


@pytest.mark.parametrize("more", [(), ("connection: keep-alive",)], ids=["by itself", "asked to stay"])
def test_stream_to_a_client_of_http_1_0_is_no_chunks_and_ends_with_the_connection(
    strict: Gateway, more: tuple[str, ...]
) -> None:
    head, rest = stream_of(strict, "1.0", *more)
    assert not [line for line in head if line.startswith((b"transfer-encoding", b"content-length"))]
    assert [line for line in head if line.startswith(b"connection")] == [b"connection: close"]
    frames = rest.split(b"\n\n")
    assert frames[-2:] == [b"data: [DONE]", b""]
    texts = [json.loads(frame.removeprefix(b"data: "))["choices"][0]["delta"].get("content") for frame in frames[:-2]]
    assert "".join(text or "" for text in texts) == "<slow>"


def test_client_of_http_1_0_that_leaves_ends_its_stream(strict: Gateway) -> None:
    body = CHAT.replace(b'"model"', b'"stream": true, "model"').replace(b'"x"', b'"<slow>%s"' % (b"x" * 200))
    with connect(strict) as connection:
        connection.sendall(said(strict, body, length(body), line="POST /v1/chat/completions HTTP/1.0"))
        while b"data: " not in connection.recv(65536):
            pass
        assert strict.stats().num_running == 1
    deadline = time.monotonic() + 5
    while strict.stats().num_running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_stream_says_of_its_connection_one_thing(strict: Gateway) -> None:
    head, rest = stream_of(strict, "1.1", "connection: close")
    assert [line for line in head if line.startswith(b"connection")] == [b"connection: close"]
    assert b"transfer-encoding: chunked" in head
    assert rest.endswith(b"0\r\n\r\n")


def test_host_of_any_kind_breaks_no_route(strict: Gateway) -> None:
    with strict.admin() as admin:
        for host in ("x:99999999", "x:-1", "[::1", "\xff[[:", "", "a b"):
            for path in ("/v1/models", "/nowhere", "/classify", "/v1/embeddings", "/generate", "/admin/v1/tenants"):
                for method in ("GET", "POST"):
                    found = admin.request(method, path, headers=[(b"host", host.encode("latin-1"))], content=b"{}")
                    assert found.status_code < 500, (host, method, path, found.text)


def test_offer_of_another_protocol_is_declined_as_often_as_it_is_made(strict: Gateway) -> None:
    """Java's client makes it with every request; here a hundred in one piece, and one in single bytes."""
    offer = said(strict, CHAT, length(CHAT), "upgrade: h2c", *UPGRADE)
    with connect(strict) as connection:
        connection.sendall(offer * 100)
        assert [read_answer(connection).status for _ in range(100)] == [200] * 100
        for number in range(len(offer)):
            connection.sendall(offer[number : number + 1])
        assert read_answer(connection).status == 200


def test_pipelined_requests_are_answered_in_order_and_each_by_itself(strict: Gateway) -> None:
    texts = [b"one", b"<slow>two", b"three"]
    bodies = [CHAT.replace(b'"x"', b'"%s"' % text) for text in texts]
    bodies.insert(1, b"{")
    with connect(strict) as connection:
        connection.sendall(b"".join(said(strict, body, length(body)) for body in bodies))
        answers = [read_answer(connection) for _ in bodies]
    assert [answer.status for answer in answers] == [200, 400, 200, 200]
    told = [answer.content["choices"][0]["message"]["content"] for answer in answers if answer.status == 200]
    assert told == [text.decode() for text in texts]


@pytest.mark.parametrize("stands", ["with a key", "without"])
@pytest.mark.parametrize(
    ("begin", "endless"), [(b"5;", b"a"), (WHOLE[:-2] + b"x: ", b"y"), (WHOLE[:-2], b"x: y\r\n")],
    ids=["chunk extension", "trailer", "trailers"],
)  # fmt: skip
def test_what_a_body_has_beside_its_bytes_is_bounded(
    gateway: Gateway, begin: bytes, endless: bytes, stands: str
) -> None:
    """Nobody needs a key to send it, and where the answer has come the connection may say no more than that."""
    key = gateway.api_key if stands == "with a key" else "nobody's"
    lines = ["POST /v1/completions HTTP/1.1", "host: x", f"authorization: Bearer {key}", CHUNKED, "", ""]
    num_sent = 0
    with connect(gateway) as connection:
        connection.sendall("\r\n".join(lines).encode() + begin)
        if key != gateway.api_key:
            assert read_answer(connection).status == 401
        while not select.select([connection], [], [], 0.005)[0]:
            assert num_sent < 2**23, "so much is kept by nobody"
            with contextlib.suppress(ConnectionError):
                num_sent += connection.send(endless * 2048)
        statuses = [line[9:12] for line in answer(connection).split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    assert statuses == ([b"431"] if key == gateway.api_key else [])
    assert gateway.stats().num_running == 0


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nowhere"])
def test_head_is_answered_as_get_without_the_body(strict: Gateway, path: str) -> None:
    with strict.client() as client:
        whole, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (whole.status_code, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]
    assert head.headers["x-request-id"]
