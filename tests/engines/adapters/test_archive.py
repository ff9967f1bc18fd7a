"""Archives nobody vouches for: what is taken out of them, and what never is."""

from __future__ import annotations

import gzip
import io
import resource
import struct
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_files
from support.archives import member, tar_gz, zipped

from loraplex.engines.adapters.sources.archive import MAX_ENTRIES, unpack
from loraplex.engines.adapters.sources.base import Transfer, TransferStopped, Workspace
from loraplex.engines.errors import AdapterInvalid, AdapterTooLarge

FILES = list(adapter_files().items())
MAX_BYTES = 2**20


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


def below(directory: str) -> list[tuple[str, bytes]]:
    return [(directory + name, content) for name, content in FILES]


@pytest.mark.parametrize("pack", [tar_gz, zipped])
@pytest.mark.parametrize("directory", ["", "./", "adapter/", "a/b/c/"])
def test_unpack_takes_the_wanted_files_of_one_directory(workspace: Workspace, pack: object, directory: str) -> None:
    assert callable(pack)
    content = pack([*below(directory), (f"{directory}README.md", b"x"), (f"{directory}more/optimizer.pt", b"x")])
    assert unpacked(content, workspace) == dict(FILES)


def test_unpack_skips_directories(workspace: Workspace) -> None:
    assert unpacked(tar_gz(below("a/"), member("a", tarfile.DIRTYPE)), workspace) == dict(FILES)


def pax_bomb() -> bytes:
    """A header that asks its reader to load 512 MiB of zeros at once, in half a megabyte."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 2**29
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as sink:
        sink.write(info.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(2**29 // 2**20):
            sink.write(bytes(2**20))
    return buffer.getvalue()


def zip_with_lying_size(num_bytes: int) -> bytes:
    """A zip whose directory says how many bytes the weights have, whatever they have."""
    content = bytearray(zipped(FILES))
    name = WEIGHTS_NAME.encode()
    header = content.rindex(name) - 46
    content[header + 24 : header + 28] = struct.pack("<I", num_bytes)
    return bytes(content)


def encrypted() -> bytes:
    content = bytearray(zipped(FILES))
    header = content.index(b"PK\1\2")
    content[header + 8] |= 1
    return bytes(content)


def many(number: int) -> list[tuple[str, bytes]]:
    return [(f"f{index}", b"") for index in range(number)]


INVALID: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "neither"),
    "plain text": (b"hello", "neither"),
    "a plain tar": (gzip.decompress(tar_gz(FILES)), "neither"),
    "gzip of nothing": (gzip.compress(b""), "damaged|no adapter_config"),
    "gzip of text": (gzip.compress(b"hello" * 500), "damaged"),
    "a tar cut short": (tar_gz(FILES)[:-200], "damaged"),
    "a zip cut short": (zipped(FILES)[:-30], "damaged"),
    "an empty tar": (tar_gz([]), "no adapter_config"),
    "an empty zip": (zipped([]), "no adapter_config"),
    "a tar with an absolute name": (tar_gz([*FILES, ("/etc/passwd", b"x")]), "points out of it"),
    "a tar with dots": (tar_gz([*FILES, ("../../x", b"x")]), "points out of it"),
    "a tar with dots inside": (tar_gz([*FILES, ("a/../../x", b"x")]), "points out of it"),
    "a zip with an absolute name": (zipped([*FILES, ("/etc/passwd", b"x")]), "points out of it"),
    "a zip with dots": (zipped([*FILES, ("../x", b"x")]), "points out of it"),
    "a zip with a backslash": (zipped([*FILES, ("..\\x", b"x")]), "impossible name"),
    "a name with a newline": (zipped([*FILES, ("a\nb", b"x")]), "impossible name"),
    "a name of 2000 letters": (tar_gz([*FILES, ("a" * 2000, b"x")]), "impossible name"),
    "a symbolic link": (tar_gz(FILES, member("x", tarfile.SYMTYPE, "/etc/passwd")), "a link"),
    "a hard link": (tar_gz(FILES, member("x", tarfile.LNKTYPE, CONFIG_NAME)), "a link"),
    "a config that is a link": (tar_gz([], member(CONFIG_NAME, tarfile.SYMTYPE, "/etc/passwd")), "a link"),
    "a device": (tar_gz(FILES, member("x", tarfile.CHRTYPE)), "not a plain file"),
    "a pipe": (tar_gz(FILES, member("x", tarfile.FIFOTYPE)), "not a plain file"),
    "a link in a zip": (zipped(FILES, mode=0o120777), "a link"),
    "a device in a zip": (zipped(FILES, mode=0o020666), "not a plain file"),
    "two adapters": (tar_gz([*below("a/"), *below("b/")]), "several adapters, in a and b"),
    "a file twice": (tar_gz([*FILES, FILES[0]]), "twice"),
    "a file twice in a zip": (zipped([*FILES, FILES[0]]), "twice"),
    "too many entries": (tar_gz([*FILES, *many(MAX_ENTRIES)]), "more than 1000 entries"),
    "too many entries in a zip": (zipped([*FILES, *many(MAX_ENTRIES)]), "more than 1000 entries"),
    "a zip directory of a megabyte": (zipped([(f"{'n' * 900}{i}", b"") for i in range(1300)]), "exceeds 1048576"),
    "a zip without directory": (b"PK\3\4" + bytes(100), "damaged"),
    "LZMA": (zipped(FILES, method=zipfile.ZIP_LZMA), "another method"),
    "bzip2": (zipped(FILES, method=zipfile.ZIP_BZIP2), "another method"),
    "an encrypted zip": (encrypted(), "encrypted"),
    "a zip that promises more": (zip_with_lying_size(5000), "damaged|shorter"),
    "a zip that promises less": (zip_with_lying_size(5), "damaged|longer"),
    "a header of half a gigabyte": (pax_bomb(), "exceeds 1048576 bytes"),
    "pickle": (tar_gz([FILES[0], ("adapter_model.bin", b"x")]), "never read"),
    "no config": (tar_gz(FILES[1:]), "no adapter_config"),
}


@pytest.mark.parametrize("case", INVALID)
def test_unpack_hostile_archive_is_invalid(workspace: Workspace, case: str) -> None:
    content, message = INVALID[case]
    with pytest.raises(AdapterInvalid, match=message) as caught:
        unpacked(content, workspace)
    assert str(caught.value).isprintable()
    assert {path.name for path in workspace.files.iterdir()} <= {CONFIG_NAME, WEIGHTS_NAME}


TOO_LARGE: dict[str, bytes] = {
    "a bomb": tar_gz([FILES[0], (WEIGHTS_NAME, bytes(2**26))]),
    "a bomb in a zip": zipped([FILES[0], (WEIGHTS_NAME, bytes(2**26))]),
    "a bomb that would be skipped": tar_gz([*FILES, ("notes.txt", bytes(2**26))]),
    "many that are large together": tar_gz([*FILES, *((f"{i}.txt", bytes(2**17)) for i in range(9))]),
    "a config of 2 MiB": zipped([(CONFIG_NAME, bytes(2**21)), FILES[1]]),
    "a zip that promises gigabytes": zip_with_lying_size(2**32 - 2),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_unpack_bomb_is_too_large(workspace: Workspace, case: str) -> None:
    with pytest.raises(AdapterTooLarge):
        unpacked(TOO_LARGE[case], workspace)
    assert sum(path.stat().st_size for path in workspace.files.iterdir()) <= MAX_BYTES


def test_unpack_header_bomb_takes_no_memory(workspace: Workspace) -> None:
    content = INVALID["a header of half a gigabyte"][0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterInvalid):
        unpacked(content, workspace)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_unpack_stops_when_nobody_waits(workspace: Workspace) -> None:
    (workspace.scratch / "archive").write_bytes(tar_gz(FILES))
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
    content = bytearray(zipped(FILES) if kind == "zip" else tar_gz(FILES))
    if kind == "tar":  # change what is compressed, so that more than the checksum is met
        content = bytearray(gzip.decompress(bytes(content)))
    for position, value in changes:
        content[position % len(content)] = value
    content = content[: len(content) - cut]
    for path in workspace.files.iterdir():
        path.unlink()
    with suppress(AdapterInvalid, AdapterTooLarge):
        unpacked(gzip.compress(bytes(content), 1) if kind == "tar" else bytes(content), workspace)
