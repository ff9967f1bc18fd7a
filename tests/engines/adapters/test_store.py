"""From every source into the cache, and what the store promises whatever the source."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.adapter_files import adapter_files, read_files, write_files
from support.hub_server import FakeHub

from loraplex.config.settings import Adapters
from loraplex.engines.adapters import store as store_module
from loraplex.engines.adapters.store import AdapterStore, StoredAdapter
from loraplex.engines.errors import AdapterNotFound, AdapterSourceUnavailable, DiskCacheFull


async def test_fetch_local_copies_the_files(store: AdapterStore, root: Path) -> None:
    files = adapter_files()
    stored = await store.fetch(str(write_files(root / "one", files | {"README.md": b"x"})), "one")
    assert read_files(stored.adapter.path) == files
    assert stored.adapter.name == "one"
    assert stored.revision == stored.adapter.id == Path(stored.adapter.path).name
    assert stored.num_bytes == sum(map(len, files.values()))
    assert stored.source == f"file://{root / 'one'}"


async def test_fetch_hub_takes_the_resolved_commit(store: AdapterStore, hub: FakeHub) -> None:
    files = adapter_files()
    _, commit = hub.repository("org/name", files | {"README.md": b"x", "adapter_model.bin": b"x"})
    stored = await store.fetch("hf://org/name", "name")
    assert read_files(stored.adapter.path) == files
    assert (stored.revision, stored.source) == (commit, "hf://org/name@main")


async def test_fetch_s3_records_the_versions(store: AdapterStore, s3: Any) -> None:
    bucket = f"b-{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=bucket)
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    files = adapter_files()
    for name, content in files.items():
        s3.put_object(Bucket=bucket, Key=f"a/b/{name}", Body=content)
    version = s3.head_object(Bucket=bucket, Key="a/b/adapter_config.json")["VersionId"]
    stored = await store.fetch(f"s3://{bucket}/a/b/", "b")
    assert read_files(stored.adapter.path) == files
    assert stored.source == f"s3://{bucket}/a/b"
    assert f"adapter_config.json={version}" in stored.revision


async def test_fetch_local_by_every_spelling_is_one_adapter(
    store: AdapterStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_files(root / "a b" / "one", adapter_files())
    (root / "link").symlink_to(directory)
    monkeypatch.chdir(root.parent)
    spellings = [
        str(directory),
        f"file://{directory}".replace(" ", "%20"),
        f"FILE://localhost{directory}/",
        "a b/one",
        "root/a b/../a b/one",
        str(root / "link"),
    ]
    fetched = [await store.fetch(spelling, "n") for spelling in spellings]
    assert all(stored == fetched[0] for stored in fetched)


async def test_fetch_local_files_may_be_links_below_the_root(store: AdapterStore, root: Path) -> None:
    """Hugging Face's own cache is laid out so."""
    files = adapter_files()
    write_files(root / "blobs", files)
    (root / "snapshot").mkdir()
    for name in files:
        (root / "snapshot" / name).symlink_to(f"../blobs/{name}")
    assert read_files((await store.fetch(str(root / "snapshot"), "n")).adapter.path) == files


async def test_fetch_takes_tokenizer_files_and_no_others(store: AdapterStore, root: Path) -> None:
    wanted = adapter_files() | {"tokenizer.json": b"{}", "chat_template.jinja": b"x", "added_tokens.json": b"{}"}
    others = {"optimizer.pt": b"x", "adapter_model.bin": b"x", "training_args.bin": b"x", "manifest.json": b"x"}
    stored = await store.fetch(str(write_files(root / "a", wanted | others)), "n")
    assert read_files(stored.adapter.path) == wanted


async def test_fetch_same_content_from_two_sources_is_one_object(store: AdapterStore, root: Path, hub: FakeHub) -> None:
    hub.repository("org/name", adapter_files())
    remote = await store.fetch("hf://org/name", "remote")
    local = await store.fetch(str(write_files(root / "a", adapter_files())), "local")
    assert remote.adapter.id == local.adapter.id
    assert remote.adapter.path == local.adapter.path
    assert (remote.adapter.name, local.adapter.name) == ("remote", "local")


async def held_fetch(store: AdapterStore, hub: FakeHub, name: str = "n") -> asyncio.Task[StoredAdapter]:
    """A fetch that the hub keeps waiting in the middle of a file."""
    hub.repository("org/name", adapter_files())
    hub.hold = hub.hold or threading.Event()
    task = asyncio.create_task(store.fetch("hf://org/name", name))
    await asyncio.to_thread(hub.holding.wait, 10)
    return task


async def test_fetch_at_once_shares_one_transfer(store: AdapterStore, hub: FakeHub) -> None:
    first = await held_fetch(store, hub, "0")
    others = [asyncio.create_task(store.fetch("HF://org/name@main", str(number))) for number in range(1, 8)]
    await asyncio.sleep(0.05)
    assert hub.hold is not None
    hub.hold.set()
    fetched = await asyncio.gather(first, *others)
    assert [stored.adapter.name for stored in fetched] == [str(number) for number in range(8)]
    assert hub.count("GET", "/api/") == 1
    assert hub.count("GET", "/resolve/") == 2


async def test_fetch_with_other_tokens_shares_nothing(store: AdapterStore, hub: FakeHub) -> None:
    first = await held_fetch(store, hub)
    others = [asyncio.create_task(store.fetch("hf://org/name", "n", token=token)) for token in ("a", "b")]
    await asyncio.sleep(0.2)
    assert hub.count("GET", "/api/") == 3
    assert hub.hold is not None
    hub.hold.set()
    assert len({(await task).adapter.id for task in (first, *others)}) == 1


async def test_fetch_one_waiter_cancelled_leaves_the_others(store: AdapterStore, hub: FakeHub) -> None:
    first = await held_fetch(store, hub)
    second = asyncio.create_task(store.fetch("hf://org/name", "second"))
    await asyncio.sleep(0.05)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert hub.hold is not None
    hub.hold.set()
    assert (await second).adapter.name == "second"


async def test_fetch_all_waiters_cancelled_then_again_succeeds(
    store: AdapterStore, hub: FakeHub, tmp_path: Path
) -> None:
    task = await held_fetch(store, hub)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert hub.hold is not None
    hub.hold.set()
    assert await store.fetch("hf://org/name", "n")
    await store.close()
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


async def test_fetch_failure_reaches_every_waiter(store: AdapterStore) -> None:
    results = await asyncio.gather(
        *(store.fetch("hf://org/none", str(number)) for number in range(4)), return_exceptions=True
    )
    assert [type(result) for result in results] == [AdapterNotFound] * 4


async def test_fetch_past_the_deadline_is_unavailable(settings: Adapters, hub: FakeHub) -> None:
    impatient = AdapterStore(msgspec.structs.replace(settings, fetch_timeout_seconds=0.3))
    task = await held_fetch(impatient, hub)
    with pytest.raises(AdapterSourceUnavailable, match=r"hf://org/name@main: not done within 0\.3 s"):
        await task
    assert hub.hold is not None
    hub.hold.set()
    await impatient.close()


async def test_fetch_never_blocks_the_loop(store: AdapterStore, hub: FakeHub) -> None:
    task = await held_fetch(store, hub)
    began = time.monotonic()
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert time.monotonic() - began < 1.0
    assert not task.done()
    assert hub.hold is not None
    hub.hold.set()
    await task


async def test_close_ends_what_is_under_way(settings: Adapters, hub: FakeHub, tmp_path: Path) -> None:
    closing = AdapterStore(settings)
    task = await held_fetch(closing, hub)
    asyncio.get_running_loop().call_later(0.2, lambda: hub.hold.set() if hub.hold else None)
    await closing.close()
    with pytest.raises(AdapterSourceUnavailable, match="closing"):
        await task
    with pytest.raises(AdapterSourceUnavailable, match="closed"):
        await closing.fetch("hf://org/name", "n")
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


async def test_fetch_into_a_full_cache_says_so(settings: Adapters, root: Path) -> None:
    small = AdapterStore(msgspec.structs.replace(settings, disk_bytes=1500))
    first = await small.fetch(str(write_files(root / "a", adapter_files(1))), "a")
    second = str(write_files(root / "b", adapter_files(2)))
    with small.hold(first.adapter), pytest.raises(DiskCacheFull, match="in use"):
        await small.fetch(second, "b")
    assert await small.fetch(second, "b")
    with pytest.raises(AdapterNotFound), small.hold(first.adapter):
        pass
    await small.close()


async def test_fetch_into_a_damaged_object_mends_it(settings: Adapters, root: Path) -> None:
    first = AdapterStore(settings)
    stored = await first.fetch(str(write_files(root / "a", adapter_files())), "a")
    await first.close()
    config = Path(stored.adapter.path) / "adapter_config.json"
    config.chmod(0o644)
    config.write_bytes(b"x" * config.stat().st_size)
    second = AdapterStore(settings)
    again = await second.fetch(str(root / "a"), "a")
    assert read_files(again.adapter.path) == adapter_files()
    await second.close()


def test_no_torch_comes_with_the_store() -> None:
    code = "import sys, loraplex.engines.adapters.store; sys.exit('torch' in sys.modules)"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(store_module.__file__).parents[3])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
