"""A request as handlers have it, without a server: who sends it, and what its work is done with."""

from __future__ import annotations

from typing import Any

from litestar import Litestar, Request

from loraplex.auth.caller import Caller
from loraplex.auth.limits.admission import Admission
from loraplex.auth.limits.memory import MemoryStore
from loraplex.auth.metering import NoBooks
from loraplex.gateway.accounts import Accounts
from loraplex.gateway.long_work import LongWork


class _Tenants:
    """Never change."""

    num_changes = 0

    def on_change(self, callback: object) -> None: ...


def accounts() -> Accounts:
    """Accounts of a store of their own."""
    return Accounts(Admission(MemoryStore(NoBooks())), NoBooks(), _Tenants())  # type: ignore[arg-type]


def asked_by(caller: Caller, on: Accounts | None = None) -> Request[Any, Any, Any]:
    """The caller's request."""
    app = Litestar(openapi_config=None, logging_config=None)
    app.state.long_work = LongWork(on or accounts())
    return Request({"type": "http", "litestar_app": app, "app": app, "state": {"caller": caller}, "headers": []})  # type: ignore[arg-type]
