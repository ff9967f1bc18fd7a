"""Sources on loopback, and a store that reads from them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import pytest_asyncio
from moto.server import ThreadedMotoServer
from support.hub_server import FakeHub, serve_hub

from loraplex.config.settings import Adapters
from loraplex.engines.adapters.store import AdapterStore, Retries

QUICK = Retries(first_pause_seconds=0.01)


@pytest.fixture
def retries() -> Retries:
    """As many attempts as anywhere, with pauses too short to notice."""
    return QUICK


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serve_hub() as served:
        yield served


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the S3 server; the gateway's own credentials are set."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "gateway")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "gateway-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return boto3.Session().client("s3", endpoint_url=s3_url)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The one directory below which local adapters may lie."""
    directory = tmp_path / "root"
    directory.mkdir()
    return directory


@pytest.fixture
def settings(tmp_path: Path, root: Path, hub: FakeHub, s3_url: str) -> Adapters:
    return Adapters(
        cache_dir=str(tmp_path / "cache"),
        local_roots=(str(root),),
        max_bytes=2**20,
        fetch_timeout_seconds=30,
        hub_endpoint=hub.url,
        s3_endpoint=s3_url,
    )


@pytest_asyncio.fixture
async def store(settings: Adapters) -> AsyncIterator[AdapterStore]:
    opened = AdapterStore(settings, retries=QUICK)
    yield opened
    await opened.close()
