"""Archives nobody vouches for: what is taken out of them, and what never is."""

from __future__ import annotations

import gzip
import resource
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from support.archives import member, tar_gz, zipped
from support.hostile_adapters import ARCHIVES, BOMBS, MAX_BYTES, MEMBERS, below

from loraplex.engines.adapters.sources.archive import unpack
from loraplex.engines.adapters.sources.base import Transfer, TransferStopped, Workspace
from loraplex.engines.errors import AdapterInvalid, AdapterTooLarge


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(files=tmp_path / "files", scratch=tmp_path / "scratch")
    made.files.mkdir()
    made.scratch.mkdir()
    return made


def unpacked(content: bytes, workspace: Workspace) -> dict[str, bytes]:
    archive = workspace.scratch / "archive"
    archive.write_bytes(content)
    unpack(archive, workspace, Transfer(MAX_BYTES))
    return {path.name: path.read_bytes() for path in workspace.files.iterdir()}


@pytest.mark.parametrize("pack", [tar_gz, zipped])
@pytest.mark.parametrize("directory", ["", "./", "adapter/", "a/b/c/"])
def test_unpack_takes_the_wanted_files_of_one_directory(workspace: Workspace, pack: object, directory: str) -> None:
    assert callable(pack)
    content = pack([*below(directory), (f"{directory}README.md", b"x"), (f"{directory}more/optimizer.pt", b"x")])
    assert unpacked(content, workspace) == dict(MEMBERS)


def test_unpack_skips_directories(workspace: Workspace) -> None:
    assert unpacked(tar_gz(below("a/"), member("a", tarfile.DIRTYPE)), workspace) == dict(MEMBERS)


@pytest.mark.parametrize("case", ARCHIVES)
def test_unpack_hostile_archive_is_invalid(workspace: Workspace, case: str) -> None:
    content, message = ARCHIVES[case]
    with pytest.raises(AdapterInvalid, match=message) as caught:
        unpacked(content, workspace)
    assert str(caught.value).isprintable()
    assert {path.name for path in workspace.files.iterdir()} <= {CONFIG_NAME, WEIGHTS_NAME}


@pytest.mark.parametrize("case", BOMBS)
def test_unpack_bomb_is_too_large(workspace: Workspace, case: str) -> None:
    with pytest.raises(AdapterTooLarge):
        unpacked(BOMBS[case], workspace)
    assert sum(path.stat().st_size for path in workspace.files.iterdir()) <= MAX_BYTES


def test_unpack_header_bomb_takes_no_memory(workspace: Workspace) -> None:
    content = ARCHIVES["a header of half a gigabyte"][0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterInvalid):
        unpacked(content, workspace)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_unpack_stops_when_nobody_waits(workspace: Workspace) -> None:
    (workspace.scratch / "archive").write_bytes(tar_gz(MEMBERS))
    transfer = Transfer(MAX_BYTES)
    transfer.stop()
    with pytest.raises(TransferStopped):
        unpack(workspace.scratch / "archive", workspace, transfer)


_changes = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=5)
_quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@_quick
@example(changes=[(1022, 1)], cut=0, kind="zip")  # a directory said to begin before the file
@given(changes=_changes, cut=st.integers(0, 60), kind=st.sampled_from(["zip", "gz", "tar"]))
def test_unpack_mutated_archive_is_sound_or_refused(
    workspace: Workspace, changes: list[tuple[int, int]], cut: int, kind: str
) -> None:
    content = bytearray(zipped(MEMBERS) if kind == "zip" else tar_gz(MEMBERS))
    if kind == "tar":  # change what is compressed, so that more than the checksum is met
        content = bytearray(gzip.decompress(bytes(content)))
    for position, value in changes:
        content[position % len(content)] = value
    content = content[: len(content) - cut]
    for path in workspace.files.iterdir():
        path.unlink()
    with suppress(AdapterInvalid, AdapterTooLarge):
        unpacked(gzip.compress(bytes(content), 1) if kind == "tar" else bytes(content), workspace)
