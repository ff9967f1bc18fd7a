"""Adapters in an S3 bucket, below one prefix. Every object is read under the ETag it was listed with."""

from __future__ import annotations

import hashlib
import re
from contextlib import closing
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from urllib3.exceptions import HTTPError

from loraplex.engines.adapters.sources.base import (
    CHUNK_BYTES,
    SOCKET_TIMEOUT_SECONDS,
    Address,
    Listing,
    RemoteFile,
    Transfer,
    Workspace,
    missing,
    num_received,
    receive,
)
from loraplex.engines.adapters.sources.selection import select
from loraplex.engines.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterNotFound,
    AdapterSourceForbidden,
    AdapterSourceUnavailable,
)

_URI = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(/(?P<prefix>.*))?")
_REFUSALS = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "401", "403", "404"}
_ABSENT = {"NoSuchBucket", "NoSuchKey", "NoSuchVersion"}
_AT = "\n"  # between an address and the versions that are meant; no address holds one


class S3Source:
    """`s3://bucket/prefix`: the objects directly below the prefix.

    A token is `access_key_id:secret_access_key` or `access_key_id:secret_access_key:session_token`; without one,
    the gateway's own credentials read the buckets in `adapters.s3_buckets`.
    """

    def __init__(self, endpoint: str | None, buckets: tuple[str, ...]) -> None:
        self._endpoint = endpoint
        self._buckets = buckets

    def parse(self, uri: str) -> Address:
        match = _URI.fullmatch(uri)
        if match is None:
            raise AdapterInvalid("this is not an address in S3; write s3://bucket/prefix")
        segments = (match["prefix"] or "").rstrip("/").split("/")
        if segments != [""] and any(segment in ("", ".", "..") for segment in segments):
            raise AdapterInvalid("the prefix has an empty, '.' or '..' segment")
        normal = f"s3://{match['bucket']}/{'/'.join(segments)}"
        return Address(uri=normal, shown=normal)

    def at(self, address: Address, revision: str) -> Address:
        """Objects' versions can be asked for until they are deleted themselves; a bucket without any has its newest."""
        if not all("=" in part for part in revision.split(",")):
            return address
        return Address(uri=f"{address.uri}{_AT}{revision}", shown=address.shown)

    def list(self, address: Address, token: str | None, transfer: Transfer) -> Listing:
        bucket, prefix, versions = _split(address)
        client = self._client(bucket, token)
        try:
            names = list(versions) or _names(client, bucket, prefix, transfer)
            if not names:
                raise AdapterNotFound("there is no object below this prefix")
            heads = {
                name: client.head_object(Bucket=bucket, Key=prefix + name, **_version(versions, name))
                for name in select(names)
            }
        except (ClientError, BotoCoreError) as error:
            raise _told(error) from None
        files = tuple(RemoteFile(name, head["ContentLength"], head["ETag"]) for name, head in heads.items())
        return Listing(revision=_revision(heads), files=files)

    def download(
        self, address: Address, listing: Listing, token: str | None, workspace: Workspace, transfer: Transfer
    ) -> None:
        bucket, prefix, versions = _split(address)
        client = self._client(bucket, token)
        for file in missing(listing, workspace):
            start = num_received(file, workspace)
            start = start if start < file.num_bytes else 0
            asked = _version(versions, file.name) | ({"Range": f"bytes={start}-"} if start else {})
            try:
                answer = client.get_object(Bucket=bucket, Key=prefix + file.name, IfMatch=file.version, **asked)
                with closing(answer["Body"]) as body:
                    start = start if "ContentRange" in answer else 0
                    receive(body.iter_chunks(CHUNK_BYTES), file, workspace, transfer, resume_at=start)
            except (ClientError, BotoCoreError, HTTPError) as error:
                raise _told(error) from None

    def _client(self, bucket: str, token: str | None) -> Any:
        """A client of one fetch's own: boto3's default session is shared and not safe to make clients from at once."""
        keys: dict[str, str] = {}
        if token is not None:
            names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
            keys = dict(zip(names, token.split(":", 2), strict=False))
            if len(keys) < 2 or not all(keys.values()):
                raise AdapterInvalid("a token for S3 is access_key_id:secret_access_key[:session_token]")
        elif self._buckets and bucket not in self._buckets:
            raise AdapterSourceForbidden(f"the bucket {bucket} is not among adapters.s3_buckets")
        config = Config(
            connect_timeout=SOCKET_TIMEOUT_SECONDS,
            read_timeout=SOCKET_TIMEOUT_SECONDS,
            retries={"total_max_attempts": 1},  # the store retries, and can be stopped while it waits
            s3={"addressing_style": "path" if self._endpoint else "auto"},
        )
        return boto3.Session().client("s3", endpoint_url=self._endpoint, config=config, **keys)


def _split(address: Address) -> tuple[str, str, dict[str, str]]:
    """(bucket, prefix, the versions that are meant by name; none means the newest)"""
    uri, _, revision = address.uri.partition(_AT)
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    versions = dict(part.split("=", 1) for part in revision.split(",")) if revision else {}
    return bucket, f"{prefix}/" if prefix else "", versions


def _version(versions: dict[str, str], name: str) -> dict[str, str]:
    return {"VersionId": versions[name]} if name in versions else {}


def _names(client: Any, bucket: str, prefix: str, transfer: Transfer) -> list[str]:
    names: list[str] = []
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"):
        transfer.check()
        names += [item["Key"].removeprefix(prefix) for item in page.get("Contents", ())]
        if len(names) > 10_000:
            raise AdapterInvalid("there are more than 10000 objects below this prefix; name one adapter's")
    return names


def _revision(heads: dict[str, Any]) -> str:
    """The objects' version ids, which `at` takes; where the bucket keeps none, a hash of what stands in for them."""
    versions = {name: head.get("VersionId", "null") for name, head in heads.items()}
    if "null" not in versions.values():
        return ",".join(f"{name}={version}" for name, version in versions.items())
    state = [f"{name} {head['ETag']} {head['ContentLength']} {head['LastModified']}" for name, head in heads.items()]
    return f"etag-{hashlib.sha256(chr(10).join(state).encode()).hexdigest()}"


def _told(error: Exception) -> AdapterError:
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return AdapterNotFound("there are no credentials for S3: give a token, or the gateway its own")
    if not isinstance(error, ClientError):
        return AdapterSourceUnavailable(f"S3 cannot be reached ({type(error).__name__})")
    code = str(error.response.get("Error", {}).get("Code", "unknown"))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _ABSENT:
        return AdapterNotFound(f"there is no such bucket or object ({code})")
    if code in _REFUSALS or status in (401, 403, 404):
        return AdapterNotFound(f"S3 refuses these credentials or has no such object ({code})")
    if status == 412:
        return AdapterSourceUnavailable("an object changed while it was read")
    return AdapterSourceUnavailable(f"S3 answers {status} ({code})")
