"""One line of a batch -> one line of its output: sent through the application's own routes until it has an answer."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from litestar.types import ASGIApp

from loraplex.auth.errors import InvalidApiKey, KeysUnavailable
from loraplex.auth.tenants import Tenants
from loraplex.gateway.batches.lines import Line
from loraplex.gateway.batches.records import Answer, Batch
from loraplex.gateway.inner import Reply, post
from loraplex.gateway.problems import UNFORESEEN, problem_of

_log = logging.getLogger("loraplex.gateway")

_LONGEST_PAUSE = 30.0  # seconds between two tries of a line
# JSON may hold them as they are; readers of lines that split texts, such as the SDK's, end a line at each.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}
_MAX_CRASHES = 3  # a line may lose its engine so often before it is told so: it may be what brings it down


class _Details(msgspec.Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _Usage(msgspec.Struct):
    """Of any route: chat and text say prompt and completion, responses say input and output."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Answered(msgspec.Struct):
    usage: _Usage | None = None


class _Problem(msgspec.Struct):
    code: str | None = None


class _Refused(msgspec.Struct):
    error: _Problem


class Answerer:
    """Asks the application on behalf of whoever made a batch."""

    def __init__(
        self, app: ASGIApp, tenants: Tenants, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._app = app
        self._tenants = tenants
        self._sleep = sleep

    async def width(self, batch: Batch, most: int) -> int:
        """How many lines may run at once: no more than half of what its limits allow, so that users find room.

        Raises KeysUnavailable.
        """
        try:
            policy = (await self._tenants.holder(batch.tenant_id, batch.key_id)).policy
        except InvalidApiKey:
            return 1
        limits = [limits.concurrent_requests for limits in (policy.tenant, policy.key)]
        return max(min([most, *(limit // 2 for limit in limits if limit is not None)]), 1)

    async def answer(self, batch: Batch, line: Line) -> Answer:
        """The line's answer, good or bad, whatever asking raises, but for what ends this task or the process."""
        request_id = _request_id(batch, line)
        try:
            return await self._answered(batch, line, request_id)
        except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  an edge; in Rust it may panic, which is no Exception
            _log.error("request %s failed", request_id, exc_info=error)
            return _answer(line, request_id, Reply(UNFORESEEN.row.status, {}, UNFORESEEN.body()))

    async def _answered(self, batch: Batch, line: Line, request_id: str) -> Answer:
        """What passes is waited for: a limit, an absent engine or database."""
        num_tries = num_crashes = 0
        while True:
            reply = await self._ask(batch, line, request_id)
            num_tries += 1
            num_crashes += _code(reply) == "engine_died"
            if not _passes(reply) or num_crashes >= _MAX_CRASHES:
                return _answer(line, request_id, reply)
            await self._sleep(_pause(reply, num_tries))

    async def _ask(self, batch: Batch, line: Line, request_id: str) -> Reply:
        try:
            caller = await self._tenants.holder(batch.tenant_id, batch.key_id)
        except (InvalidApiKey, KeysUnavailable) as error:
            problem = problem_of(error)
            return Reply(problem.row.status, {}, problem.body())
        background = msgspec.structs.replace(caller, is_background=True)
        return await post(self._app, batch.endpoint, line.body, background, request_id)


def unanswered(batch: Batch, line: Line, code: str, message: str) -> Answer:
    """What a line gets that was never answered."""
    told = {"id": _request_id(batch, line), "custom_id": line.custom_id, "response": None}
    text = _as_line({**told, "error": {"code": code, "message": message}})
    return Answer(line=line.number, text=text, is_error=True)


def _as_line(told: dict[str, Any]) -> str:
    return msgspec.json.encode(told).decode().translate(_LINE_ENDS)


def _request_id(batch: Batch, line: Line) -> str:
    return f"batch_req_{batch.id.removeprefix('batch_')}_{line.number}"


def _answer(line: Line, request_id: str, reply: Reply) -> Answer:
    is_error = reply.status >= 300
    response: dict[str, Any] = {"status_code": reply.status, "request_id": request_id, "body": msgspec.Raw(reply.body)}
    told = {"id": request_id, "custom_id": line.custom_id, "response": response, "error": None}
    usage = None if is_error else msgspec.json.decode(reply.body, type=_Answered).usage
    usage = usage or _Usage()
    prompt = usage.prompt_tokens_details or usage.input_tokens_details or _Details()
    completion = usage.completion_tokens_details or usage.output_tokens_details or _Details()
    return Answer(
        line=line.number,
        text=_as_line(told),
        is_error=is_error,
        num_prompt_tokens=usage.prompt_tokens or usage.input_tokens,
        num_cached_tokens=prompt.cached_tokens,
        num_completion_tokens=usage.completion_tokens or usage.output_tokens,
        num_reasoning_tokens=completion.reasoning_tokens,
    )


def _passes(reply: Reply) -> bool:
    """Whether the same request may well be answered later."""
    if reply.status == 429:
        return reply.headers.get("x-should-retry") != "false"
    return reply.status == 503 or _code(reply) == "engine_died"


def _code(reply: Reply) -> str | None:
    if reply.status < 400:
        return None
    try:
        return msgspec.json.decode(reply.body, type=_Refused).error.code
    except msgspec.DecodeError:
        return None


def _pause(reply: Reply, num_tries: int) -> float:
    """As long as the answer asks for, and longer from try to try."""
    asked = float(reply.headers.get("retry-after-ms", "0")) / 1000
    return min(max(asked, 0.1 * 2.0 ** min(num_tries, 10)), _LONGEST_PAUSE)
