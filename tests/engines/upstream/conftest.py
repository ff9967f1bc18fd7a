"""The demo's base behind one gateway, and a gateway whose engine is that server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from msgspec.structs import replace
from support.gateway import running, settings_in, write_adapter
from support.upstream import (
    ADMIN_KEY,
    BASE,
    KEY_ENV,
    MOST_ADAPTERS,
    Pair,
    built,
    in_front_of,
    leave,
    register,
    write_echo_base,
)

from loraplex.config.demo import ADAPTERS_DIR, MODEL_DIR
from loraplex.config.settings import EngineSettings, Model


@pytest.fixture(scope="module")
def keys() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPLEX_TEST_ADMIN_KEY", ADMIN_KEY)
        patch.setenv(KEY_ENV, ADMIN_KEY)
        patch.setattr("loraplex.gateway.services.build_engine", built)
        yield


@pytest.fixture(scope="module")
def demo(keys: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both serve the demo's adapters under the same names; at the upstream the front has two at a time."""
    home, front_home = tmp_path_factory.mktemp("native"), tmp_path_factory.mktemp("front")
    settings = settings_in(home)
    settings = replace(
        settings,
        model=Model(path=str(MODEL_DIR), name=BASE, dtype="float32", device="cpu"),
        engine=EngineSettings(num_threads=1, kv_cache_bytes=64 * 2**20, max_draft_tokens=0),
        adapters=replace(settings.adapters, local_roots=(str(ADAPTERS_DIR), str(front_home)), device_bytes=64 * 2**20),
    )
    with running(settings, ADMIN_KEY) as upstream:
        front_settings = in_front_of(upstream.url, front_home, MODEL_DIR, BASE, max_adapters=MOST_ADAPTERS)
        adapters = replace(front_settings.adapters, local_roots=(str(ADAPTERS_DIR), str(front_home / "local")))
        with running(replace(front_settings, adapters=adapters), ADMIN_KEY) as front:
            front.adapter_dir = front_home / "local"
            for gateway in (upstream, front):
                gateway.tenant_id, gateway.api_key = gateway.new_tenant("tests")
                for name in ("pirate", "json", "spanish"):
                    register(gateway, name, ADAPTERS_DIR / name)
            yield Pair(front, upstream)


@pytest.fixture(scope="module")
def echo(keys: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The front knows the echo's vocabulary from files, and adapters that the upstream knows from it alone."""
    home, front_home = tmp_path_factory.mktemp("echo"), tmp_path_factory.mktemp("front")
    settings = settings_in(home)
    settings = replace(settings, adapters=replace(settings.adapters, local_roots=(str(front_home),)))
    with running(settings, ADMIN_KEY) as upstream:
        base = write_echo_base(front_home / "base")
        with running(in_front_of(upstream.url, front_home, base, BASE, max_adapters=MOST_ADAPTERS), ADMIN_KEY) as front:
            front.tenant_id, front.api_key = front.new_tenant("tests")
            upstream.tenant_id, upstream.api_key = upstream.new_tenant("tests")
            for rank in (1, 2, 3, 4):
                register(front, f"rank-{rank}", write_adapter(front_home / "local" / f"rank-{rank}", rank))
            yield Pair(front, upstream)


@pytest.fixture(autouse=True)
def left() -> Iterator[None]:
    """No client's connections outlive their test."""
    yield
    leave()
