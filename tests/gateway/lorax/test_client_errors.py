"""lorax-client raises a class of its own for each kind of error; both of its clients, on both of its methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.client_venvs import INSTALL_SECONDS
from support.gateway import Gateway
from support.lorax_client import lorax_calls

from loraplex.engines.errors import DeadlineExceeded, EngineOverloaded
from loraplex.engines.protocol import GenerateRequest

pytestmark = pytest.mark.timeout(INSTALL_SECONDS + 60)


def prompt(text: str, **arguments: Any) -> dict[str, Any]:
    return {"arguments": {"prompt": text, **arguments}}


# what is asked, and what the client raises for it
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "value": (prompt("a", max_new_tokens=9999), "ValidationError", "`max_new_tokens` must be <= 512"),
    "not offered": (prompt("a", watermark=True), "UnprocessableEntityError", "`watermark` is not offered"),
    "unknown adapter": (prompt("a", adapter_id="no/such"), "NotFoundError", "no/such"),
    "forbidden source": (prompt("a", adapter_id="org/x", adapter_source="hub"), "ValidationError", "request_adapters"),
    "no such source": (prompt("a", adapter_id="x", adapter_source="pbase"), "UnprocessableEntityError", "adapter_sour"),
    "wrong key": ({**prompt("a"), "key": "sk-wrong"}, "UnknownError", "401"),
    "failed": (prompt("<fail>"), "GenerationError", "Request failed during generation"),
    "died": (prompt("<die>"), "IncompleteGenerationError", "Incomplete generation"),
    "overloaded": (prompt("<overloaded>"), "OverloadedError", "the queue is full"),
    "late": (prompt("<late>"), "ShardTimeoutError", "too late"),
    "garbled": ({**prompt("a"), "garbles": True}, "BadRequestError", "not valid JSON"),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], dict[str, Any]]:
    generate = gateway.services.engine.generate

    def fail_on_demand(request: GenerateRequest) -> Any:
        text = gateway.services.engine.tokenizer.decode(request.prompt_token_ids)
        if text == "<overloaded>":
            raise EngineOverloaded("the queue is full")
        if text == "<late>":
            raise DeadlineExceeded("too late")
        return generate(request)

    calls, places = [], []
    for name, (case, _, _) in CASES.items():
        for client in ("sync", "async"):
            for method in ("generate", "generate_stream"):
                if case.get("garbles") and client == "async":
                    continue  # it has no session to give it
                calls.append({"client": client, "method": method, "key": gateway.api_key, **case})
                places.append((name, client, method))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gateway.services.engine, "generate", fail_on_demand)
        found = lorax_calls(gateway.url, calls, tmp_path_factory.mktemp("calls"))
    return dict(zip(places, found, strict=True))


@pytest.mark.parametrize("method", ["generate", "generate_stream"])
@pytest.mark.parametrize("name", CASES)
def test_client_raises_its_own_class(
    outcomes: dict[tuple[str, str, str], dict[str, Any]], name: str, method: str
) -> None:
    _, raised, message = CASES[name]
    for client in ("sync", "async"):
        if (name, client, method) in outcomes:
            outcome = outcomes[name, client, method]
            assert outcome.get("raised") == raised, outcome
            assert message in outcome["message"]
            in_stream = method == "generate_stream" and name in ("failed", "died")
            assert len(outcome["events"]) == (4 if in_stream else 0)


def test_client_raises_for_limits(gateway: Gateway, tmp_path: Path) -> None:
    tenant, key = gateway.new_tenant("client-limits")
    with gateway.admin() as admin:
        limits = {"requests_per_minute": 1}
        assert admin.put(f"/admin/v1/tenants/{tenant}/limits", json=limits).status_code == 200
    call = {"method": "generate", "key": key, **prompt("a")}
    first, *others = lorax_calls(
        gateway.url, [{**call, "client": kind} for kind in ("sync", "sync", "async")], tmp_path
    )
    assert first["answer"]["generated_text"] == "a"
    assert [other["raised"] for other in others] == ["RateLimitExceededError"] * 2


def test_client_raises_for_an_engine_that_is_not_ready(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.services.engine, "_state", "starting")
    call = {"method": "generate", "key": gateway.api_key, **prompt("a")}
    found = lorax_calls(gateway.url, [{**call, "client": kind} for kind in ("sync", "async")], tmp_path)
    assert [one["raised"] for one in found] == ["ShardNotReadyError"] * 2
