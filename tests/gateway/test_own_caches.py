"""Gateways whose disk caches are their own: what one registered, another serves out of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import pytest
from openai import OpenAI
from support.gateway import Gateway, running, settings_in, write_adapter

ADMIN_KEY = "an-admin-key-that-is-long-enough"


@contextmanager
def gateway_with(home: Path, cache: str) -> Iterator[Gateway]:
    """One of those on the database in `home`."""
    settings = settings_in(home)
    adapters = msgspec.structs.replace(settings.adapters, cache_dir=str(home / cache))
    with running(msgspec.structs.replace(settings, adapters=adapters), ADMIN_KEY) as gateway:
        yield gateway


def ask(gateway: Gateway, key: str) -> str:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
        return client.completions.create(model="shout", prompt="hello", max_tokens=4).choices[0].text


@pytest.mark.parametrize("is_at_once", [True, False], ids=["two-gateways", "moved-between-starts"])
def test_adapter_is_served_out_of_another_cache_than_it_was_registered_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_at_once: bool
) -> None:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", ADMIN_KEY)
    source = write_adapter(tmp_path / "local" / "shout")
    with ExitStack() as stack:
        first = stack.enter_context(gateway_with(tmp_path, "first"))
        _, key = first.new_tenant("acme")
        with first.admin() as admin:
            assert admin.post("/admin/v1/adapters", json={"name": "shout", "source": str(source)}).is_success
        answer = ask(first, key)
        if not is_at_once:
            stack.close()
        second = stack.enter_context(gateway_with(tmp_path, "second"))
        assert [ask(second, key) for _ in range(2)] == [answer] * 2
        assert [path.name for path in (tmp_path / "second").glob("objects/*/*/adapter_config.json")] != []
        with second.admin() as admin:
            assert admin.post("/admin/v1/adapters/shout/warm").is_success
            assert admin.post("/admin/v1/adapters/shout/pin").is_success
        if is_at_once:
            assert ask(first, key) == answer


def test_adapter_is_fetched_again_into_a_cache_that_was_emptied_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", ADMIN_KEY)
    source = write_adapter(tmp_path / "local" / "shout")
    with gateway_with(tmp_path, "cache") as gateway, gateway.admin() as admin:
        _, key = gateway.new_tenant("acme")
        assert admin.post("/admin/v1/adapters", json={"name": "shout", "source": str(source)}).is_success
        answer = ask(gateway, key)
        shutil.rmtree(tmp_path / "cache")
        assert admin.get("/metrics").is_success
        assert ask(gateway, key) == answer
