"""The S3 source against moto's server on loopback."""

from __future__ import annotations

import traceback
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_files, read_files

from loraplex.config.settings import Adapters
from loraplex.engines.adapters.sources.base import Address, RemoteFile, Transfer, Workspace
from loraplex.engines.adapters.sources.s3 import S3Source
from loraplex.engines.adapters.store import AdapterStore, Retries
from loraplex.engines.errors import (
    AdapterInvalid,
    AdapterNotFound,
    AdapterSourceForbidden,
    AdapterSourceUnavailable,
    AdapterTooLarge,
)


@pytest.fixture
def bucket(s3: Any) -> str:
    name = f"b-{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=name)
    return name


def put(s3: Any, bucket: str, prefix: str, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        s3.put_object(Bucket=bucket, Key=prefix + name, Body=content)
    return f"s3://{bucket}/{prefix}"


async def test_s3_bucket_root_is_a_prefix_too(store: AdapterStore, s3: Any, bucket: str) -> None:
    uri = put(s3, bucket, "", adapter_files())
    put(s3, bucket, "deeper/", adapter_files(1))
    stored = await store.fetch(uri, "n")
    assert read_files(stored.adapter.path) == adapter_files()


async def test_s3_prefix_is_a_whole_directory_name(store: AdapterStore, s3: Any, bucket: str) -> None:
    put(s3, bucket, "one-more/", adapter_files())
    with pytest.raises(AdapterNotFound, match="no object below this prefix"):
        await store.fetch(f"s3://{bucket}/one", "n")


async def test_s3_unversioned_revision_follows_the_objects(store: AdapterStore, s3: Any, bucket: str) -> None:
    uri = put(s3, bucket, "a/", adapter_files(1))
    first = await store.fetch(uri, "n")
    assert first.revision == (await store.fetch(uri, "n")).revision
    put(s3, bucket, "a/", adapter_files(2))
    second = await store.fetch(uri, "n")
    assert first.revision != second.revision
    assert read_files(second.adapter.path) == adapter_files(2)


async def test_s3_known_revision_is_not_read_again(
    store: AdapterStore, s3: Any, bucket: str, settings: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = put(s3, bucket, "a/", adapter_files())
    first = await store.fetch(uri, "n")

    def refuse(*_: object) -> None:
        raise AssertionError("downloaded again")

    monkeypatch.setattr(S3Source, "download", refuse)
    assert await store.fetch(uri, "n") == first


async def test_s3_versions_of_a_revision_come_back_whatever_is_newest(
    settings: Adapters, s3: Any, bucket: str, tmp_path: Path
) -> None:
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    first = AdapterStore(settings)
    uri = put(s3, bucket, "a/", adapter_files(1))
    stored = await first.fetch(uri, "n")
    await first.close()
    assert stored.revision.startswith(f"{CONFIG_NAME}=")
    put(s3, bucket, "a/", adapter_files(2))
    for name in adapter_files():
        s3.delete_object(Bucket=bucket, Key=f"a/{name}")  # a marker above the versions
    elsewhere = AdapterStore(msgspec.structs.replace(settings, cache_dir=str(tmp_path / "elsewhere")))
    again = await elsewhere.fetch(uri, "n", content=stored.adapter.id, revision=stored.revision)
    assert read_files(again.adapter.path) == adapter_files(1)
    assert (again.revision, again.source) == (stored.revision, stored.source)
    with pytest.raises(AdapterNotFound, match="no object below this prefix"):
        await elsewhere.fetch(uri, "n")
    await elsewhere.close()


async def test_s3_revision_whose_versions_are_deleted_is_not_found(
    settings: Adapters, s3: Any, bucket: str, tmp_path: Path
) -> None:
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    first = AdapterStore(settings)
    uri = put(s3, bucket, "a/", adapter_files(1))
    stored = await first.fetch(uri, "n")
    await first.close()
    version = dict(part.split("=") for part in stored.revision.split(","))[WEIGHTS_NAME]
    put(s3, bucket, "a/", adapter_files(2))
    s3.delete_object(Bucket=bucket, Key=f"a/{WEIGHTS_NAME}", VersionId=version)
    elsewhere = AdapterStore(msgspec.structs.replace(settings, cache_dir=str(tmp_path / "elsewhere")))
    with pytest.raises(AdapterNotFound, match="no such object"):
        await elsewhere.fetch(uri, "n", content=stored.adapter.id, revision=stored.revision)
    await elsewhere.close()


async def test_s3_missing_bucket_is_not_found(store: AdapterStore, s3: Any) -> None:
    with pytest.raises(AdapterNotFound, match="no such bucket"):
        await store.fetch("s3://there-is-none/a", "n")


async def test_s3_bucket_not_on_the_list_is_forbidden(settings: Adapters, s3: Any, bucket: str) -> None:
    narrow = AdapterStore(msgspec.structs.replace(settings, s3_buckets=("another",)))
    uri = put(s3, bucket, "a/", adapter_files())
    with pytest.raises(AdapterSourceForbidden, match="s3_buckets"):
        await narrow.fetch(uri, "n")
    assert await narrow.fetch(uri, "n", token="own-key:own-secret")
    await narrow.close()


@pytest.mark.parametrize("token", ["key", "key:", ":secret", "key:secret:"])
async def test_s3_token_of_another_form_is_invalid(store: AdapterStore, token: str) -> None:
    with pytest.raises(AdapterInvalid, match="access_key_id:secret_access_key"):
        await store.fetch("s3://bucket/a", "n", token=token)


async def test_s3_without_credentials_says_so(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "nowhere")
    with pytest.raises(AdapterNotFound, match="no credentials"):
        await store.fetch("s3://bucket/a", "n")


async def test_s3_listing_over_the_limit_is_too_large(store: AdapterStore, s3: Any, bucket: str) -> None:
    uri = put(s3, bucket, "a/", adapter_files(size=2**16))
    with pytest.raises(AdapterTooLarge, match="max_bytes"):
        await store.fetch(uri, "n")


async def test_s3_that_is_not_there_is_unavailable(settings: Adapters, retries: Retries) -> None:
    lonely = AdapterStore(msgspec.structs.replace(settings, s3_endpoint="http://127.0.0.1:9"), retries=retries)
    secret = uuid.uuid4().hex
    with pytest.raises(AdapterSourceUnavailable, match="cannot be reached") as caught:
        await lonely.fetch("s3://bucket/a", "n", token=f"key:{secret}")
    assert secret not in "".join(traceback.format_exception(caught.value))
    await lonely.close()


@pytest.fixture
def workspace(tmp_path: Any) -> Workspace:
    made = Workspace(files=tmp_path / "files", scratch=tmp_path / "scratch")
    made.files.mkdir()
    made.scratch.mkdir()
    return made


def test_s3_partial_file_is_resumed(s3: Any, s3_url: str, bucket: str, workspace: Workspace) -> None:
    files = adapter_files(size=1000)
    source, transfer = S3Source(s3_url, ()), Transfer(2**20)
    address = source.parse(put(s3, bucket, "a", {f"/{name}": content for name, content in files.items()}))
    listing = source.list(address, None, transfer)
    (workspace.scratch / WEIGHTS_NAME).write_bytes(files[WEIGHTS_NAME][:5000])
    (workspace.files / CONFIG_NAME).write_bytes(b"complete already")
    source.download(address, listing, None, workspace, transfer)
    assert (workspace.files / WEIGHTS_NAME).read_bytes() == files[WEIGHTS_NAME]
    assert (workspace.files / CONFIG_NAME).read_bytes() == b"complete already"


def test_s3_object_changed_since_the_listing_is_told(s3: Any, s3_url: str, bucket: str, workspace: Workspace) -> None:
    source, transfer = S3Source(s3_url, ()), Transfer(2**20)
    address: Address = source.parse(put(s3, bucket, "a/", adapter_files(1)))
    listing = source.list(address, None, transfer)
    assert isinstance(listing.files[0], RemoteFile)
    put(s3, bucket, "a/", adapter_files(2))
    with pytest.raises(AdapterSourceUnavailable, match="changed while it was read"):
        source.download(address, listing, None, workspace, transfer)
