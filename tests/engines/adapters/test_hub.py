"""The hub source against a server that speaks the hub's protocol on loopback."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import traceback
from pathlib import Path

import msgspec
import pytest
from support.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_files, read_files
from support.hub_server import FakeHub, serve_hub

from loraplex.config.settings import Adapters
from loraplex.engines.adapters.manifest import check
from loraplex.engines.adapters.store import AdapterStore, Retries
from loraplex.engines.errors import AdapterNotFound, AdapterSourceUnavailable, AdapterTooLarge

TOKEN = "hf_very_secret_token"


async def test_hub_revision_names_a_branch_tag_or_commit(store: AdapterStore, hub: FakeHub) -> None:
    repository, first = hub.repository("org/name", adapter_files(1))
    second = repository.push(adapter_files(2), ref="refs/pr/1")
    for revision, commit in (("main", first), ("refs/pr/1", second), (second, second)):
        assert (await store.fetch(f"hf://org/name@{revision}", "n")).revision == commit


async def test_hub_branch_that_moves_is_followed(store: AdapterStore, hub: FakeHub) -> None:
    repository, _ = hub.repository("org/name", adapter_files(1))
    before = await store.fetch("hf://org/name", "n")
    repository.push(adapter_files(2))
    after = await store.fetch("hf://org/name", "n")
    assert before.adapter.id != after.adapter.id
    assert read_files(before.adapter.path) == adapter_files(1)


async def test_hub_known_commit_is_not_downloaded_again(store: AdapterStore, hub: FakeHub, settings: Adapters) -> None:
    hub.repository("org/name", adapter_files())
    first = await store.fetch("hf://org/name", "n")
    num_files = hub.count("GET", "/resolve/")
    later = AdapterStore(settings)
    assert await later.fetch("hf://org/name", "n") == first
    assert hub.count("GET", "/resolve/") == num_files
    await later.close()


async def test_hub_private_repository_takes_the_token(store: AdapterStore, hub: FakeHub) -> None:
    repository, _ = hub.repository("org/private", adapter_files())
    repository.token = TOKEN
    assert await store.fetch("hf://org/private", "n", token=TOKEN)
    with pytest.raises(AdapterNotFound, match="no such repository, or the token may not read it"):
        await store.fetch("hf://org/private", "n")
    with pytest.raises(AdapterNotFound):
        await store.fetch("hf://org/private", "n", token="hf_another")


async def test_hub_never_sends_the_gateways_own_token(
    store: AdapterStore, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_operator")
    hub.repository("org/name", adapter_files())
    await store.fetch("hf://org/name", "n")
    assert hub.requests
    assert not [headers for _, _, headers in hub.requests if "authorization" in headers]


async def test_hub_token_stays_out_of_errors_and_logs(
    store: AdapterStore, hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    repository, _ = hub.repository("org/private", adapter_files())
    repository.token = "another"
    hub.failures = [503]
    with pytest.raises(AdapterNotFound) as caught:
        await store.fetch("hf://org/private", "n", token=TOKEN)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert TOKEN not in caplog.text
    assert "attempt 1 failed" in caplog.text


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_hub_refusal_is_not_tried_again(store: AdapterStore, hub: FakeHub, status: int) -> None:
    hub.failures = [status] * 9
    with pytest.raises(AdapterNotFound, match="hf://org/name@main: "):
        await store.fetch("hf://org/name", "n")
    assert len(hub.requests) == 1


async def test_hub_gated_repository_says_so(store: AdapterStore, hub: FakeHub) -> None:
    repository, _ = hub.repository("org/gated", adapter_files())
    repository.is_gated = True
    with pytest.raises(AdapterNotFound, match="gated"):
        await store.fetch("hf://org/gated", "n", token=TOKEN)


@pytest.mark.parametrize("token", [None, "hf_another"], ids=["no token", "another token"])
async def test_hub_gated_repository_that_one_token_opened_stays_closed_to_others(
    store: AdapterStore, hub: FakeHub, token: str | None
) -> None:
    """The hub lists it to anyone, and its files at this commit are here already."""
    repository, _ = hub.repository("org/gated", adapter_files())
    repository.is_gated, repository.granted = True, TOKEN
    opened = await store.fetch("hf://org/gated", "n", token=TOKEN)
    with pytest.raises(AdapterNotFound, match="gated"):
        await store.fetch("hf://org/gated", "n", token=token)
    assert await store.fetch("hf://org/gated", "n", token=TOKEN) == opened


async def test_hub_unknown_revision_says_so(store: AdapterStore, hub: FakeHub) -> None:
    hub.repository("org/name", adapter_files())
    with pytest.raises(AdapterNotFound, match="no such revision"):
        await store.fetch("hf://org/name@v9", "n")


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_hub_trouble_that_passes_is_waited_out(store: AdapterStore, hub: FakeHub, status: int) -> None:
    hub.repository("org/name", adapter_files())
    hub.failures = [status] * 2
    assert await store.fetch("hf://org/name", "n")


async def test_hub_trouble_that_stays_is_unavailable(store: AdapterStore, hub: FakeHub) -> None:
    hub.failures = [500] * 99
    with pytest.raises(AdapterSourceUnavailable, match="the hub answers 500"):
        await store.fetch("hf://org/name", "n")
    assert len(hub.requests) == 5


async def test_hub_that_is_not_there_is_unavailable(settings: Adapters, retries: Retries) -> None:
    lonely = AdapterStore(msgspec.structs.replace(settings, hub_endpoint="http://127.0.0.1:9"), retries=retries)
    with pytest.raises(AdapterSourceUnavailable, match="cannot be reached"):
        await lonely.fetch("hf://org/name", "n")
    await lonely.close()


async def test_hub_transfer_cut_off_is_resumed(settings: Adapters, hub: FakeHub) -> None:
    """At the byte where it broke off."""
    roomy = AdapterStore(msgspec.structs.replace(settings, max_bytes=2**25))
    files = adapter_files(size=2**19)
    hub.repository("org/name", files)
    hub.cut_after = 15 * 2**20
    stored = await roomy.fetch("hf://org/name", "n")
    assert read_files(stored.adapter.path) == files
    check(Path(stored.adapter.path), read_bytes=True)  # the hash went on, too
    ranges = [headers.get("range") for _, _, headers in hub.requests]
    assert ranges.count(f"bytes={15 * 2**20}-") == 1
    await roomy.close()


async def test_hub_that_sends_everything_again_is_taken_from_the_beginning(store: AdapterStore, hub: FakeHub) -> None:
    hub.repository("org/name", adapter_files(size=2**14))
    hub.cut_after, hub.knows_ranges = 2**15, False
    stored = await store.fetch("hf://org/name", "n")
    check(Path(stored.adapter.path), read_bytes=True)
    assert read_files(stored.adapter.path) == adapter_files(size=2**14)


async def test_hub_asks_for_each_file_once_and_for_nothing_besides(store: AdapterStore, hub: FakeHub) -> None:
    hub.repository("org/name", adapter_files())
    await store.fetch("hf://org/name", "n")
    asked = [(method, path.rpartition("/")[2]) for method, path, _ in hub.requests]
    assert asked == [("GET", "main"), *(("GET", name) for name in sorted(adapter_files()))]


async def test_hub_token_does_not_go_where_files_are_elsewhere(store: AdapterStore, hub: FakeHub) -> None:
    repository, _ = hub.repository("org/private", adapter_files())
    repository.token = TOKEN
    with serve_hub() as elsewhere:
        elsewhere.repository("org/private", adapter_files())
        hub.files_at = elsewhere.url
        await store.fetch("hf://org/private", "n", token=TOKEN)
        assert elsewhere.count("GET", "/resolve/") == len(adapter_files())
        assert not [headers for _, _, headers in elsewhere.requests if "authorization" in headers]
    assert {headers["authorization"] for _, _, headers in hub.requests} == {f"Bearer {TOKEN}"}


async def test_hub_listing_over_the_limit_downloads_nothing(store: AdapterStore, hub: FakeHub) -> None:
    hub.repository("org/name", adapter_files(size=2**16))
    with pytest.raises(AdapterTooLarge, match="max_bytes = 1048576"):
        await store.fetch("hf://org/name", "n")
    assert hub.count("GET", "/resolve/") == 0


async def test_hub_file_larger_than_listed_is_stopped(store: AdapterStore, hub: FakeHub) -> None:
    repository, _ = hub.repository("org/name", adapter_files(size=2**17))
    repository.listed_sizes = {WEIGHTS_NAME: 1000}
    with pytest.raises(AdapterSourceUnavailable, match="the 1000 bytes announced"):
        await store.fetch("hf://org/name", "n")


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        (b"<html>", "not a model's listing"),
        (b"[]", "not a model's listing"),
        (b"{}", "not a model's listing"),
        (b'{"id": "org/name", "siblings": []}', "names no commit"),
        (b'{"id": "org/name", "sha": "../../x", "siblings": []}', "names no commit"),
        (b'{"id": "org/name", "siblings": [{"size": 3}]}', "not a model's listing"),
    ],
)
async def test_hub_listing_of_another_kind_is_unavailable(
    store: AdapterStore, hub: FakeHub, listing: bytes, message: str
) -> None:
    hub.raw_listing = listing
    with pytest.raises(AdapterSourceUnavailable, match=message):
        await store.fetch("hf://org/name", "n")


async def test_hub_listing_without_sizes_is_unavailable(store: AdapterStore, hub: FakeHub) -> None:
    repository, _ = hub.repository("org/name", adapter_files())
    repository.listed_sizes = {CONFIG_NAME: None}
    with pytest.raises(AdapterSourceUnavailable, match="does not say how large"):
        await store.fetch("hf://org/name", "n")


async def test_hub_download_given_up_ends_and_cleans(store: AdapterStore, hub: FakeHub, tmp_path: Path) -> None:
    hub.repository("org/name", adapter_files())
    hub.hold = threading.Event()
    fetch = asyncio.create_task(store.fetch("hf://org/name", "n"))
    await asyncio.to_thread(hub.holding.wait, 10)
    fetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    hub.hold.set()
    await store.close()
    assert os.listdir(tmp_path / "cache" / "staging") == []
    assert list((tmp_path / "cache" / "objects").iterdir()) == []
