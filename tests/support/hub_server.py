"""A Hugging Face hub on loopback: model listing, access, HEAD and GET of files with ranges; trouble and slowness on
demand."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_PIECE_SECONDS = 0.05


@dataclass
class Repository:
    """`commits` maps a commit to its files; `refs` maps branch and tag names to commits.

    One that is gated is listed to anyone; its files are for `granted`, the token of an account that has access.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    is_gated: bool = False
    granted: str | None = None
    listed_sizes: dict[str, int | None] = field(default_factory=dict)

    def push(self, files: dict[str, bytes], ref: str = "main") -> str:
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit


@dataclass
class FakeHub:
    """`failures` are statuses to answer with before all is well; `cut_after` breaks a transfer off once, in bytes.

    `requests` are (method, path, headers by their names in small letters).
    `files_at` is where files are instead: the address of another one, that requests for them are sent on to.
    `bytes_per_second` slows each file down. `busy_seconds` is how long requests for a repository were being answered.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    cut_after: int | None = None
    knows_ranges: bool = True
    files_at: str | None = None
    raw_listing: bytes | None = None
    hold: threading.Event | None = None
    bytes_per_second: float | None = None
    busy_seconds: dict[str, float] = field(default_factory=dict)
    holding: threading.Event = field(default_factory=threading.Event)

    def repository(self, name: str, files: dict[str, bytes]) -> tuple[Repository, str]:
        repository = self.repositories.setdefault(name, Repository())
        return repository, repository.push(files)

    def count(self, method: str, part: str) -> int:
        return sum(1 for verb, path, _ in self.requests if verb == method and part in path)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # headers and body in one segment
    disable_nagle_algorithm = True  # a piece that is due leaves without the last one's acknowledgement
    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        sent = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append((self.command, path, sent))
        began = time.perf_counter()
        self._answer(path)
        name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        self.hub.busy_seconds[name] = self.hub.busy_seconds.get(name, 0.0) + time.perf_counter() - began

    def _answer(self, path: str) -> None:
        if self.hub.failures:
            return self._send(self.hub.failures.pop(0))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 6 and parts[4] == "revision":
            return self._listing("/".join(parts[2:4]), "/".join(parts[5:]))
        if parts[:2] == ["api", "models"] and parts[4:] == ["auth-check"]:
            return self._access("/".join(parts[2:4]))
        if len(parts) == 5 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), parts[3], parts[4])
        return self._send(404)

    def _repository(self, name: str) -> Repository | None:
        """The repository, or None after an answer that refuses it."""
        repository = self.hub.repositories.get(name)
        authorization = self.headers.get("Authorization")
        if repository is None or (repository.token and authorization != f"Bearer {repository.token}"):
            self._send(401 if authorization is None else 404, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def _opened(self, name: str) -> Repository | None:
        """The repository for someone who wants its files, or None after an answer that refuses it."""
        repository = self._repository(name)
        authorization = self.headers.get("Authorization")
        if repository is None or not repository.is_gated or authorization == f"Bearer {repository.granted}":
            return repository
        self._send(401 if authorization is None else 403, {"X-Error-Code": "GatedRepo"})
        return None

    def _access(self, name: str) -> None:
        if self._opened(name) is not None:
            self._send(200, {"Content-Type": "application/json"}, b"{}")

    def _listing(self, name: str, revision: str) -> None:
        if self.hub.raw_listing is not None:
            return self._send(200, {"Content-Type": "application/json"}, self.hub.raw_listing)
        repository = self._repository(name)
        if repository is None:
            return None
        commit = repository.refs.get(revision, revision)
        files = repository.commits.get(commit)
        if files is None:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        sizes = {name: len(content) for name, content in files.items()} | repository.listed_sizes
        siblings = [{"rfilename": name, "size": size, "blobId": "0" * 40} for name, size in sizes.items()]
        answer = {"id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "siblings": siblings}
        answer["gated"] = "manual" if repository.is_gated else False
        return self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _file(self, name: str, commit: str, file_name: str) -> None:
        repository = self._opened(name)
        if repository is None:
            return None
        content = repository.commits.get(repository.refs.get(commit, commit), {}).get(file_name)
        if content is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound"})
        if self.hub.files_at is not None:
            return self._send(302, {"Location": self.hub.files_at + self.path})
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"X-Repo-Commit": commit, "ETag": etag, "X-Linked-Etag": etag, "Accept-Ranges": "bytes"}
        headers["X-Linked-Size"] = str(len(content))
        requested = self.headers.get("Range")
        if requested is None or not self.hub.knows_ranges:
            return self._send(200, headers, content)
        start = int(requested.removeprefix("bytes=").split("-")[0])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(206, headers, content[start:])

    def _send(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "GET":
            return
        cut = self.hub.cut_after
        if cut is not None and "/resolve/" in self.path and len(body) > cut:
            self.hub.cut_after = None
            self.wfile.write(body[:cut])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(1)
            return
        if self.hub.hold is not None and "/resolve/" in self.path:
            self.wfile.write(body[:1])
            self.wfile.flush()
            self.hub.holding.set()
            self.hub.hold.wait(30)
            body = body[1:]
        try:
            self._write(body)
        except OSError:  # the client left
            self.close_connection = True

    def _write(self, body: bytes) -> None:
        """At once, or in pieces of which each leaves when it is due."""
        rate = self.hub.bytes_per_second
        if rate is None or "/resolve/" not in self.path:
            self.wfile.write(body)
            return
        self.wfile.flush()
        began, piece = time.perf_counter(), max(1, int(rate * _PIECE_SECONDS))
        for offset in range(0, len(body), piece):
            sent = body[offset : offset + piece]
            time.sleep(max(0.0, began + (offset + len(sent)) / rate - time.perf_counter()))
            self.wfile.write(sent)
            self.wfile.flush()


@contextmanager
def serve_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        if hub.hold is not None:
            hub.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()
