"""One call of the admin REST API, or the reason why it failed, as an exit code and a sentence."""

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from email.message import Message
from http import HTTPStatus
from typing import IO, Any

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
        self._opener = urllib.request.build_opener(_StayHere)

    def get(self, path: str, query: Mapping[str, object] | None = None) -> Any:
        """Values of the query that are None are left out. Raises CommandFailed, as all of these."""
        given = {name: value for name, value in (query or {}).items() if value is not None}
        text = urllib.parse.urlencode(given, doseq=True)
        return self._call("GET", f"{path}?{text}" if text else path)

    def post(self, path: str, body: object = None) -> Any:
        return self._call("POST", path, body)

    def put(self, path: str, body: object) -> Any:
        return self._call("PUT", path, body)

    def delete(self, path: str) -> Any:
        return self._call("DELETE", path)

    def _call(self, method: str, path: str, body: object = None) -> Any:
        request = urllib.request.Request(
            f"{self._url}/admin/v1/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"authorization": f"Bearer {self._key}", "content-type": "application/json"},
        )
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


def _refusal(error: urllib.error.HTTPError) -> CommandFailed:
    exit_code = UNREACHABLE if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR else REFUSED
    try:
        said = json.loads(error.read())["error"]
        return CommandFailed(f"{said['message']} ({said['code']})", exit_code)
    except (ValueError, KeyError, TypeError):
        return CommandFailed(f"The server answered {error.code}; is this a loraplex server?", exit_code)
