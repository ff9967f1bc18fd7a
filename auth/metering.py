"""What one request asks for and what it used: the words between the gateway, the limits and the books."""

from __future__ import annotations

from typing import Protocol

import msgspec

RUNNING = "running"
COMPLETED = "completed"
ABORTED = "aborted"  # the client left
INTERRUPTED = "interrupted"  # the gateway's process ended, or what was done in the background was cut off


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """One request before anything is generated for it.

    `request_id` is the server's own and unique, `trace_id` what `x-request-id` says. `adapter_id` is the version's
    content hash, "" for the base. Prompt tokens are exact; `is_open_ended` where the client named no limit, so that
    `max_completion_tokens` is only what the context leaves.
    """

    request_id: str
    trace_id: str
    route: str
    model: str
    adapter_id: str
    num_prompt_tokens: int
    max_completion_tokens: int
    is_open_ended: bool = False


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One request and what it used. Times are seconds since 1970.

    `outcome` is RUNNING, COMPLETED, ABORTED, INTERRUPTED, or the class of the error that ended it. `ended_at` is None
    while it runs, and where nobody saw the end.
    """

    request_id: str
    trace_id: str
    route: str
    tenant_id: str
    key_id: str
    model: str
    adapter_id: str
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    began_at: float
    first_token_at: float | None = None
    ended_at: float | None = None
    outcome: str = RUNNING


class Entry(Protocol):
    """One request in the books, while it runs."""

    def progress(self, num_completion_tokens: int, num_cached_tokens: int) -> None:
        """So many tokens in all are about to be given to the client, and so many of the prompt's were cached."""
        ...


class Books(Protocol):
    """Where usage is written down. Each request is begun once and settled once; nothing here waits for a disk."""

    def begin(self, record: UsageRecord) -> Entry:
        """The request was admitted; nothing has been generated. Raises UsageUnrecorded."""
        ...

    def settle(self, record: UsageRecord) -> None:
        """The request is over, however it ended."""
        ...

    async def spent(self, tenant_id: str, key_id: str | None, since: float) -> int:
        """Tokens, prompt and completion, of requests that began at or after `since`, of one key or of all keys.

        `since` is midnight, UTC. Raises LimitsUnavailable where the books cannot be read.
        """
        ...


class NoBooks:
    """Implements `Books`, and the `Entry` of every request, and keeps nothing."""

    def begin(self, record: UsageRecord) -> Entry:
        return self

    def progress(self, num_completion_tokens: int, num_cached_tokens: int) -> None: ...

    def settle(self, record: UsageRecord) -> None: ...

    async def spent(self, tenant_id: str, key_id: str | None, since: float) -> int:
        return 0
