"""One call of the admin REST API, or the reason why it failed, as an exit code and a sentence."""

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from email.message import Message
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

from loraplex.gateway.console.forms import multipart_form

REFUSED, MISUSED, UNREACHABLE = 1, 2, 3  # exit codes


class CommandFailed(Exception):
    """`str(error)` is for the operator; `exit_code` for scripts."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _StayHere(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to wherever it leads."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


class _Heard(http.client.HTTPConnection):
    """A server may answer and close before it read all of a body; what it said is worth more than that it closed."""

    def request(self, *arguments: Any, **options: Any) -> None:
        try:
            super().request(*arguments, **options)
        except (BrokenPipeError, ConnectionResetError):
            if self.sock is None:
                raise


class _HeardOverTls(_Heard, http.client.HTTPSConnection):
    """The same over TLS."""


class _Listen(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Heard, req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HeardOverTls, req)


class AdminClient:
    """The admin API of one server."""

    def __init__(self, url: str, key: str | None, timeout_seconds: float = 600.0) -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise CommandFailed(f"{url!r} is not an http:// or https:// address.", MISUSED)
        if not key:
            raise CommandFailed("No admin key: set LORAPLEX_ADMIN_KEY, or give --key.", MISUSED)
        self._url = url.rstrip("/").removesuffix("/v1")
        self._key = key
        self._timeout = timeout_seconds
        self._opener = urllib.request.build_opener(_StayHere, _Listen)

    def get(self, path: str, query: Mapping[str, object] | None = None) -> Any:
        """Values of the query that are None are left out. Raises CommandFailed, as all of these."""
        return self._call("GET", path + query_of(query or {}))

    def post(self, path: str, body: object = None) -> Any:
        return self._call("POST", path, body)

    def put(self, path: str, body: object) -> Any:
        return self._call("PUT", path, body)

    def patch(self, path: str, body: object) -> Any:
        return self._call("PATCH", path, body)

    def delete(self, path: str) -> Any:
        return self._call("DELETE", path)

    def send(self, path: str, files: Sequence[Path]) -> Any:
        """Post files as multipart/form-data, read while they are sent."""
        with ExitStack() as opened:
            try:
                streams = {file.name: opened.enter_context(file.open("rb")) for file in files}
            except OSError as error:
                raise CommandFailed(f"{error.filename} cannot be read: {error.strerror}", MISUSED) from None
            headers, pieces = multipart_form(streams)
            return self._open(self._request("POST", path, pieces, headers))

    def _call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        return self._open(self._request(method, path, data, {"content-type": "application/json"}))

    def _request(self, method: str, path: str, data: Any, headers: dict[str, str]) -> urllib.request.Request:
        headers = {"authorization": f"Bearer {self._key}", **headers}
        return urllib.request.Request(f"{self._url}/admin/v1/{path}", method=method, data=data, headers=headers)

    def _open(self, request: urllib.request.Request) -> Any:
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                raw = answer.read()
                return json.loads(raw) if raw else None
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise CommandFailed(f"{self._url} cannot be reached: {reason}", UNREACHABLE) from None


def part(text: str) -> str:
    """A part of a path, whatever is in it."""
    return urllib.parse.quote(text, safe="")


def query_of(values: Mapping[str, object]) -> str:
    """What follows a path: nothing, or `?` and the values that are not None."""
    text = urllib.parse.urlencode({name: value for name, value in values.items() if value is not None}, doseq=True)
    return f"?{text}" if text else ""


def _refusal(error: urllib.error.HTTPError) -> CommandFailed:
    exit_code = UNREACHABLE if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR else REFUSED
    try:
        said = json.loads(error.read())["error"]
        return CommandFailed(f"{said['message']} ({said['code']})", exit_code)
    except (ValueError, KeyError, TypeError):
        return CommandFailed(f"The server answered {error.code}; is this a loraplex server?", exit_code)
