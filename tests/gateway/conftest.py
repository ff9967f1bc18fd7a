"""One gateway over the echo engine for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from msgspec.structs import replace
from support.gateway import Gateway, running, settings_in, write_adapter

ADMIN_KEY = "an-admin-key-of-the-tests"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("gateway")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPLEX_TEST_ADMIN_KEY", ADMIN_KEY)
        with running(settings_in(home, keep_alive_seconds=0.2, send_timeout_seconds=1.0), ADMIN_KEY) as gateway:
            gateway.tenant_id, gateway.api_key = gateway.new_tenant("tests")
            gateway.adapter_dir = home / "local"
            source = write_adapter(home / "local" / "shared", rank=4)
            with gateway.admin() as admin:
                made = admin.post("/admin/v1/adapters", json={"name": "team/echo-one", "source": str(source)})
                assert made.status_code == 201, made.text
            yield gateway


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose model reasons between <think> tags."""
    home = tmp_path_factory.mktemp("thinking")
    settings = settings_in(home)
    settings = replace(settings, model=replace(settings.model, reasoning_parser="think"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPLEX_TEST_ADMIN_KEY", ADMIN_KEY)
        with running(settings, ADMIN_KEY) as gateway:
            gateway.tenant_id, gateway.api_key = gateway.new_tenant("thinkers")
            yield gateway
