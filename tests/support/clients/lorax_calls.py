"""Runs beside lorax-client, in an environment of its own: makes the calls that a file lists, tells what came of each.

A call is `{"client": "sync" | "async", "key", "method", "arguments"}`. What came of it is `{"answer"}`, `{"events"}`,
or `{"raised", "message"}`, with the events before the error, if there were any.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import requests
from lorax import AsyncClient, Client, MergedAdapters


class GarblingSession(requests.Session):
    """Sends half of every body, for the client itself sends nothing that is no JSON."""

    def post(self, url: str, data: Any = None, json: Any = None, **options: Any) -> requests.Response:  # type: ignore[override]
        whole = requests.Request("POST", url, json=json).prepare().body
        assert isinstance(whole, bytes)
        return super().post(url, data=whole[: len(whole) // 2], **options)


def arguments_of(call: dict[str, Any]) -> dict[str, Any]:
    arguments = dict(call["arguments"])
    if "merged_adapters" in arguments:
        arguments["merged_adapters"] = MergedAdapters(**arguments["merged_adapters"])
    return arguments


def call_sync(url: str, call: dict[str, Any]) -> dict[str, Any]:
    session = GarblingSession() if call.get("garbles") else None
    client = Client(url, headers={"Authorization": f"Bearer {call['key']}"}, timeout=60, session=session)
    events: list[Any] = []
    try:
        found = getattr(client, call["method"])(**arguments_of(call))
        if call["method"] != "generate_stream":
            return {"answer": found.model_dump(mode="json")}
        events.extend(event.model_dump(mode="json") for event in found)
    except Exception as error:  # noqa: BLE001  told to the test
        return {"events": events, "raised": type(error).__name__, "message": str(error)}
    return {"events": events}


async def call_async(url: str, call: dict[str, Any]) -> dict[str, Any]:
    client = AsyncClient(url, headers={"Authorization": f"Bearer {call['key']}"}, timeout=60)
    events: list[Any] = []
    try:
        found = getattr(client, call["method"])(**arguments_of(call))
        if call["method"] != "generate_stream":
            return {"answer": (await found).model_dump(mode="json")}
        async for event in found:
            events.append(event.model_dump(mode="json"))
    except Exception as error:  # noqa: BLE001  told to the test
        return {"events": events, "raised": type(error).__name__, "message": str(error)}
    return {"events": events}


def main() -> None:
    url, calls = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    found = [
        asyncio.run(call_async(url, call)) if call["client"] == "async" else call_sync(url, call) for call in calls
    ]
    print(json.dumps(found))


main()
