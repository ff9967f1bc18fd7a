"""From every source into the cache, and what the store promises whatever the source."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from support.adapter_files import adapter_files, read_files, write_files
from support.hub_server import FakeHub

from loraplex.engines.adapters.store import AdapterStore


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
