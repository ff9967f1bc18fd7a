"""Clients that send too slowly, too much, or nonsense: refused within bounds, and nobody else notices."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator

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
