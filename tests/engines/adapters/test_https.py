"""The https source against a TLS server on loopback."""

from __future__ import annotations

import asyncio
import socket
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from support.adapter_files import adapter_files, read_files, write_files
from support.archives import tar_gz, zipped
from support.tls_server import Authority, WebServer, make_authority, respond, serve_web

from loraplex.config.settings import Adapters, SettingsError
from loraplex.engines.adapters.store import AdapterStore, Retries
from loraplex.engines.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterNotFound,
    AdapterSourceForbidden,
    AdapterSourceUnavailable,
    AdapterTooLarge,
)

FILES = adapter_files()
ARCHIVE = tar_gz(FILES.items())


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def web(authority: Authority) -> Iterator[WebServer]:
    with serve_web(authority) as served:
        yield served


@pytest.fixture
def settings(tmp_path: Path, authority: Authority) -> Adapters:
    return Adapters(
        cache_dir=str(tmp_path / "cache"),
        max_bytes=2**20,
        https_allow_private=True,
        https_ca_file=str(authority.ca_file),
    )


@pytest_asyncio.fixture
async def store(settings: Adapters, retries: Retries) -> AsyncIterator[AdapterStore]:
    opened = AdapterStore(settings, retries=retries)
    yield opened
    await opened.close()


@pytest.mark.parametrize("body", [ARCHIVE, zipped(FILES.items())], ids=["tar.gz", "zip"])
async def test_https_archive_is_unpacked(store: AdapterStore, web: WebServer, body: bytes) -> None:
    stored = await store.fetch(web.page("/adapter", body), "n")
    assert read_files(stored.adapter.path) == FILES
    assert stored.revision == stored.adapter.id


async def test_https_query_is_sent_and_not_shown(store: AdapterStore, web: WebServer) -> None:
    address = web.page("/a.tar.gz", ARCHIVE)
    stored = await store.fetch(f"{address}?X-Signature=secret#fragment", "n")
    assert stored.source == address
    assert web.requests[0][0] == "/a.tar.gz?X-Signature=secret"
    with pytest.raises(AdapterNotFound) as caught:
        await store.fetch(f"{web.url}/none?X-Signature={'se' + 'cret'}", "n")
    assert "secret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_https_redirect_is_followed(store: AdapterStore, web: WebServer, status: int) -> None:
    web.page("/a.tar.gz", ARCHIVE)
    web.page("/deeper/old", b"", status, Location="../a.tar.gz")
    assert await store.fetch(f"{web.url}/deeper/old", "n")


async def test_https_sixth_redirect_is_too_much(store: AdapterStore, web: WebServer) -> None:
    for number in range(6):
        web.page(f"/{number}", b"", 302, Location=f"/{number + 1}")
    web.page("/6", ARCHIVE)
    assert await store.fetch(f"{web.url}/1", "n")
    with pytest.raises(AdapterSourceUnavailable, match="more than 5 redirects"):
        await store.fetch(f"{web.url}/0", "n")


@pytest.mark.parametrize(
    ("location", "kind", "message"),
    [
        ("http://127.0.0.1/x", AdapterSourceForbidden, "http is not https"),
        ("file:///etc/passwd", AdapterSourceForbidden, "file is not https"),
        ("https://user:pass@127.0.0.1/x", AdapterInvalid, "no user or password"),
        ("https://[::1/x", AdapterInvalid, "not an https address"),
        ("https://127.0.0.1:99999/x", AdapterInvalid, "not an https address"),
        ("https://127.0.0.1/a b", AdapterInvalid, "not an https address"),
    ],
)
async def test_https_redirect_elsewhere_is_refused(
    store: AdapterStore, web: WebServer, location: str, kind: type[AdapterError], message: str
) -> None:
    web.page("/old", b"", 302, Location=location)
    with pytest.raises(kind, match=message):
        await store.fetch(f"{web.url}/old", "n")


async def test_https_private_address_is_forbidden(settings: Adapters, web: WebServer, retries: Retries) -> None:
    strict = AdapterStore(msgspec.structs.replace(settings, https_allow_private=False), retries=retries)
    with pytest.raises(AdapterSourceForbidden, match=r"leads to 127\.0\.0\.1, which is not a public address"):
        await strict.fetch(web.page("/a.tar.gz", ARCHIVE), "n")
    assert web.requests == []
    await strict.close()


async def test_https_token_goes_to_the_first_host_only(
    store: AdapterStore, web: WebServer, authority: Authority
) -> None:
    with serve_web(authority) as other:
        target = other.page("/a.tar.gz", ARCHIVE)
        web.page("/here", b"", 302, Location="/there")
        web.page("/there", b"", 302, Location=target)
        await store.fetch(f"{web.url}/here", "n", token="secret")
        assert [headers.get("Authorization") for _, headers in web.requests] == ["Bearer secret"] * 2
        assert [headers.get("Authorization") for _, headers in other.requests] == [None]


async def test_https_unknown_authority_is_forbidden(settings: Adapters, web: WebServer, retries: Retries) -> None:
    public = AdapterStore(msgspec.structs.replace(settings, https_ca_file=None), retries=retries)
    with pytest.raises(AdapterSourceForbidden, match="no valid certificate"):
        await public.fetch(web.page("/a.tar.gz", ARCHIVE), "n")
    await public.close()


async def test_https_certificate_of_another_host_is_forbidden(
    tmp_path: Path, settings: Adapters, retries: Retries
) -> None:
    authority = make_authority(tmp_path, host="127.0.0.2")
    other = AdapterStore(msgspec.structs.replace(settings, https_ca_file=str(authority.ca_file)), retries=retries)
    with serve_web(authority) as web:
        with pytest.raises(AdapterSourceForbidden, match="no valid certificate"):
            await other.fetch(web.page("/a.tar.gz", ARCHIVE), "n")
    await other.close()


def test_https_ca_file_without_certificates_is_a_settings_error(tmp_path: Path, settings: Adapters) -> None:
    (tmp_path / "empty.pem").write_bytes(b"")
    for name in ("empty.pem", "missing.pem"):
        with pytest.raises(SettingsError, match="https_ca_file"):
            AdapterStore(msgspec.structs.replace(settings, https_ca_file=str(tmp_path / name)))


async def test_https_ca_file_may_lie_in_the_home_directory(
    tmp_path: Path, settings: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    authority = make_authority(tmp_path, host="127.0.0.2")
    store = AdapterStore(msgspec.structs.replace(settings, https_ca_file=f"~/{authority.ca_file.name}"))
    await store.close()


@pytest.mark.parametrize("status", [401, 403, 404, 410])
async def test_https_refusal_is_not_tried_again(store: AdapterStore, web: WebServer, status: int) -> None:
    with pytest.raises(AdapterNotFound, match=str(status)):
        await store.fetch(web.page("/a", b"", status), "n")
    assert len(web.requests) == 1


async def test_https_trouble_that_stays_is_unavailable(store: AdapterStore, web: WebServer) -> None:
    with pytest.raises(AdapterSourceUnavailable, match="answers 503"):
        await store.fetch(web.page("/a", b"", 503), "n")
    assert len(web.requests) == 5


async def test_https_announced_size_over_the_limit_is_not_read(store: AdapterStore, web: WebServer) -> None:
    def page(handler: BaseHTTPRequestHandler) -> None:
        respond(handler, 200, b"", {"Content-Length": str(2**40)})

    web.pages["/a"] = page
    with pytest.raises(AdapterTooLarge, match=str(2**40)):
        await store.fetch(f"{web.url}/a", "n")


async def test_https_endless_answer_is_stopped(store: AdapterStore, web: WebServer) -> None:
    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(2**16))

    web.pages["/a"] = page
    with pytest.raises(AdapterTooLarge, match="exceeds"):
        await store.fetch(f"{web.url}/a", "n")


def cut_once(web: WebServer, body: bytes, etag: str, *, honest: bool = True) -> list[str | None]:
    """A page that breaks off once; returns the ranges it is asked for. Dishonest, it sends another part."""
    ranges: list[str | None] = []

    def page(handler: BaseHTTPRequestHandler) -> None:
        ranges.append(handler.headers.get("Range"))
        if len(ranges) == 1:
            respond(handler, 200, body[: len(body) // 2], {"Content-Length": str(len(body)), "ETag": etag})
        elif ranges[-1] is None:
            respond(handler, 200, body, {"ETag": etag})
        else:
            start = int(ranges[-1].removeprefix("bytes=").removesuffix("-")) - (0 if honest else 7)
            part = f"bytes {start}-{len(body) - 1}/{len(body)}"
            respond(handler, 206, body[start:], {"Content-Range": part, "ETag": etag})

    web.pages["/a"] = page
    return ranges


async def test_https_transfer_cut_off_is_resumed(store: AdapterStore, web: WebServer) -> None:
    ranges = cut_once(web, ARCHIVE, '"v1"')
    stored = await store.fetch(f"{web.url}/a", "n")
    assert read_files(stored.adapter.path) == FILES
    assert ranges == [None, f"bytes={len(ARCHIVE) // 2}-"]


@pytest.mark.parametrize("etag", ["", 'W/"v1"'])
async def test_https_transfer_without_strong_validator_starts_over(
    store: AdapterStore, web: WebServer, etag: str
) -> None:
    ranges = cut_once(web, ARCHIVE, etag)
    assert await store.fetch(f"{web.url}/a", "n")
    assert ranges == [None, None]


async def test_https_wrong_part_starts_over(store: AdapterStore, web: WebServer) -> None:
    ranges = cut_once(web, ARCHIVE, '"v1"', honest=False)
    assert await store.fetch(f"{web.url}/a", "n")
    assert ranges == [None, f"bytes={len(ARCHIVE) // 2}-", None]


def dribble(start: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    """A page that goes on with a byte every tenth of a second, for three seconds."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(start)
        for _ in range(30):
            time.sleep(0.1)
            handler.wfile.write(b"x")

    return page


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that connects and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"https://127.0.0.1:{server.getsockname()[1]}/a"


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n",
        b"HTTP/1.0 200 OK\r\nX-Slow: ",
        None,
    ],
    ids=["body", "body without length", "chunk", "header", "handshake"],
)
async def test_https_slow_server_keeps_no_thread_past_the_deadline(
    settings: Adapters, web: WebServer, silent: str, tmp_path: Path, start: bytes | None
) -> None:
    """However small the pieces that it sends: the next fetch has the thread at once, and the store can be closed."""
    one = msgspec.structs.replace(settings, max_fetches=1, fetch_timeout_seconds=0.5, local_roots=(str(tmp_path),))
    impatient = AdapterStore(one)
    address = silent
    if start is not None:
        web.pages["/a"], address = dribble(start), f"{web.url}/a"
    with pytest.raises(AdapterSourceUnavailable, match="not done within"):
        await impatient.fetch(address, "n")
    assert await impatient.fetch(str(write_files(tmp_path / "local", FILES)), "n")
    slow = asyncio.create_task(impatient.fetch(address, "n"))
    await asyncio.sleep(0.2)
    began = time.monotonic()
    await impatient.close()
    assert time.monotonic() - began < 0.5
    with pytest.raises(AdapterSourceUnavailable):
        await slow


async def test_https_that_is_not_there_is_unavailable(store: AdapterStore) -> None:
    with pytest.raises(AdapterSourceUnavailable, match="cannot be reached"):
        await store.fetch("https://127.0.0.1:9/a", "n")


async def test_https_answer_that_is_no_http_is_unavailable(store: AdapterStore, web: WebServer) -> None:
    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"SSH-2.0\r\n\r\n")

    web.pages["/a"] = page
    with pytest.raises(AdapterSourceUnavailable, match="broke off"):
        await store.fetch(f"{web.url}/a", "n")
