"""The disk tier: atomic, bounded, shared by processes, and whole after a kill at any moment."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from support import cache_writer
from support.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_files, read_files

from loraplex.engines.adapters import disk
from loraplex.engines.adapters.disk import DiskCache, StoredObject
from loraplex.engines.errors import AdapterInvalid, AdapterNotFound, AdapterTooLarge, DiskCacheFull

SOURCE_DIRECTORY = Path(disk.__file__).parents[3]


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache", 2**20)


def put(cache: DiskCache, files: dict[str, bytes]) -> StoredObject:
    with cache.stage() as workspace:
        for name, content in files.items():
            (workspace.files / name).write_bytes(content)
        return cache.commit(workspace)


def blob(seed: int, size: int = 1000) -> dict[str, bytes]:
    return {"adapter_model.safetensors": random.Random(seed).randbytes(size)}


def staged(tmp_path: Path) -> list[str]:
    return os.listdir(tmp_path / "cache" / "staging")


def test_commit_places_read_only_files_by_content(cache: DiskCache, tmp_path: Path) -> None:
    files = adapter_files()
    stored = put(cache, files)
    assert read_files(stored.path) == files
    assert stored.num_bytes == sum(map(len, files.values()))
    assert Path(stored.path) == tmp_path / "cache" / "objects" / stored.id[:2] / stored.id
    assert {path.stat().st_mode & 0o777 for path in Path(stored.path).iterdir()} == {0o444}
    assert staged(tmp_path) == []
    cache.verify(stored.id)


def test_commit_same_content_is_one_object(cache: DiskCache) -> None:
    assert put(cache, adapter_files()) == put(cache, adapter_files())
    assert put(cache, adapter_files(1)).id != put(cache, adapter_files()).id
    assert len(cache.ids()) == 2


def test_id_depends_on_names_and_content(cache: DiskCache) -> None:
    ids = {put(cache, {CONFIG_NAME: first, WEIGHTS_NAME: second}).id for first, second in ((b"a", b"b"), (b"b", b"a"))}
    assert len(ids) == 2


def test_stage_abandoned_leaves_nothing(cache: DiskCache, tmp_path: Path) -> None:
    with cache.stage() as workspace:
        (workspace.files / "a").write_bytes(b"x")
    assert staged(tmp_path) == []
    assert cache.ids() == []


def overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def damage_byte(place: Path) -> None:
    content = bytearray((place / WEIGHTS_NAME).read_bytes())
    content[-1] ^= 1
    overwrite(place / WEIGHTS_NAME, bytes(content))


DAMAGES = {
    "a flipped bit": (damage_byte, "sha256"),
    "a short file": (lambda place: overwrite(place / WEIGHTS_NAME, b""), "has not its"),
    "a missing file": (lambda place: (place / WEIGHTS_NAME).unlink(), "has not its"),
    "a surplus file": (lambda place: (place / "x").write_bytes(b""), "not its own: x"),
    "no manifest": (lambda place: (place / "manifest.json").unlink(), "cannot be read"),
    "a broken manifest": (lambda place: overwrite(place / "manifest.json", b"{"), "cannot be read"),
    "another manifest": (lambda place: overwrite(place / "manifest.json", b'{"files":[]}'), "lists other files"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named_then_removed(cache: DiskCache, tmp_path: Path, case: str) -> None:
    stored = put(cache, adapter_files())
    damage, message = DAMAGES[case]
    damage(Path(stored.path))
    with pytest.raises(AdapterInvalid, match=message):
        cache.verify(stored.id)
    other = DiskCache(tmp_path / "cache", 2**20)  # has verified nothing yet
    assert other.find(stored.id) is None
    assert put(other, adapter_files()) == stored
    other.verify(stored.id)


def test_files_that_are_not_the_caches_own_do_not_disturb_it(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 3000)
    stored = put(cache, blob(0, 1500))
    shelf = Path(stored.path).parent
    (shelf / ".DS_Store").write_bytes(b"x")
    (shelf / "junk").mkdir()
    (tmp_path / "cache" / "staging" / "file").write_bytes(b"x")
    assert put(cache, blob(1, 1500)).id in cache.ids()
    assert stored.id not in cache.ids()
    DiskCache(tmp_path / "cache", 3000)
    assert staged(tmp_path) == []


def test_file_in_an_objects_place_gives_way(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 3000)
    stored = put(cache, blob(0))
    shutil.rmtree(stored.path)
    Path(stored.path).write_bytes(b"x")
    assert put(cache, blob(0)) == stored
    cache.verify(stored.id)


@pytest.mark.parametrize("object_id", ["", "..", "../../etc", "A" * 64, "0" * 63, "0" * 64])
def test_verify_unknown_id_is_not_found(cache: DiskCache, object_id: str) -> None:
    with pytest.raises(AdapterNotFound):
        cache.verify(object_id)


def test_commit_evicts_the_least_recently_used(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 5000)
    first, second, third = (put(cache, blob(seed)) for seed in range(3))
    assert cache.find(first.id)
    put(cache, blob(3, 2000))
    assert second.id not in cache.ids()
    assert {first.id, third.id} <= set(cache.ids())


def test_cache_never_exceeds_its_size(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 10_000)
    for seed in range(30):
        put(cache, blob(seed, 200 * (seed % 7 + 1)))
        used = sum(path.stat().st_size for path in (tmp_path / "cache" / "objects").rglob("*") if path.is_file())
        assert used <= 10_000


def test_commit_larger_than_the_cache_is_too_large(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 5000)
    kept = put(cache, blob(0))
    with pytest.raises(AdapterTooLarge, match="disk_bytes = 5000"):
        put(cache, blob(1, 6000))
    assert cache.ids() == [kept.id]
    assert staged(tmp_path) == []


def test_hold_keeps_from_eviction_until_the_last_holder(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 3000)
    held = put(cache, blob(0, 1500))
    with cache.hold(held.id) as path:
        with cache.hold(held.id):
            pass
        with pytest.raises(DiskCacheFull, match="in use"):
            put(cache, blob(1, 1500))
        assert (path / "adapter_model.safetensors").exists()
    put(cache, blob(1, 1500))
    assert held.id not in cache.ids()


def test_hold_of_another_process_keeps_from_eviction(tmp_path: Path) -> None:
    """Two caches over one directory are what two processes are: locks belong to open directories."""
    ours, theirs = DiskCache(tmp_path / "cache", 3000), DiskCache(tmp_path / "cache", 3000)
    held = put(ours, blob(0, 1500))
    with ours.hold(held.id), pytest.raises(DiskCacheFull, match="in use"):
        put(theirs, blob(1, 1500))
    put(theirs, blob(1, 1500))
    with pytest.raises(AdapterNotFound, match=held.id), ours.hold(held.id):
        pass


def test_sweep_removes_the_dead_and_spares_the_living(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 2**20)
    dead = tmp_path / "cache" / "staging" / "dead"
    (dead / "files").mkdir(parents=True)
    (dead / "files" / "a").write_bytes(b"x")
    with cache.stage() as workspace:
        DiskCache(tmp_path / "cache", 2**20)
        assert workspace.files.is_dir()
        assert not dead.exists()


def test_stage_while_others_start_and_sweep(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 2**20)
    is_over = threading.Event()

    def start_again_and_again() -> None:
        while not is_over.is_set():
            DiskCache(tmp_path / "cache", 2**20)

    sweepers = [threading.Thread(target=start_again_and_again) for _ in range(2)]
    for sweeper in sweepers:
        sweeper.start()
    try:
        stored = [put(cache, blob(seed)) for seed in range(100)]
    finally:
        is_over.set()
        for sweeper in sweepers:
            sweeper.join()
    assert set(cache.ids()) == {one.id for one in stored}


def test_recall_knows_revisions_while_the_object_lives(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 3000)
    with cache.stage() as workspace:
        (workspace.files / "adapter_model.safetensors").write_bytes(b"x" * 1500)
        stored = cache.commit(workspace)
        cache.remember("hf://a/b", "c" * 40, stored.id, workspace)
    assert cache.recall("hf://a/b", "c" * 40) == stored
    assert cache.recall("hf://a/b", "d" * 40) is None
    put(cache, blob(1, 1500))
    assert cache.recall("hf://a/b", "c" * 40) is None
    DiskCache(tmp_path / "cache", 3000)
    assert os.listdir(tmp_path / "cache" / "refs") == []


@pytest.mark.parametrize("lost", ["", "objects", "staging", "refs"], ids=["all", "objects", "staging", "refs"])
def test_cache_that_was_emptied_meanwhile_fills_again(cache: DiskCache, tmp_path: Path, lost: str) -> None:
    before = put(cache, blob(1))
    shutil.rmtree(tmp_path / "cache" / lost)
    known = 0 if lost in ("", "objects") else 1
    assert (cache.usage()[0], len(cache.ids())) == (known, known)
    with cache.stage() as workspace:
        (workspace.files / WEIGHTS_NAME).write_bytes(b"x" * 1500)
        stored = cache.commit(workspace)
        cache.remember("hf://a/b", "c" * 40, stored.id, workspace)
    assert cache.recall("hf://a/b", "c" * 40) == stored
    assert put(cache, blob(1)) == before
    assert set(cache.ids()) == {before.id, stored.id}
    for part in ("", "objects", "staging", "refs"):
        assert (tmp_path / "cache" / part).stat().st_mode & 0o777 == 0o700


def test_threads_that_commit_hold_and_evict_at_once(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 6000)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(40):
                stored = put(cache, blob(chance.randrange(12), 900))
                with suppress(AdapterNotFound), cache.hold(stored.id) as path:  # evicted between the two: fetch again
                    assert len((path / "adapter_model.safetensors").read_bytes()) == 900
        except BaseException as error:  # noqa: BLE001  told to the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for object_id in cache.ids():
        cache.verify(object_id)


@contextmanager
def writer(cache: Path, max_bytes: int, seed: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, cache_writer.__file__, str(cache), str(max_bytes), str(seed)]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE_DIRECTORY)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def test_killed_at_any_moment_the_cache_is_whole(tmp_path: Path) -> None:
    chance = random.Random(7)
    num_objects = 0
    for seed in range(30):
        with writer(tmp_path / "cache", 1_500_000, seed):
            time.sleep(chance.uniform(0.0, 0.08))
        cache = DiskCache(tmp_path / "cache", 1_500_000)
        assert staged(tmp_path) == []
        for object_id in cache.ids():
            cache.verify(object_id)
        num_objects += len(cache.ids())
    assert num_objects > 30


@contextmanager
def put_and_hold(cache: DiskCache, files: dict[str, bytes]) -> Iterator[StoredObject]:
    """As a user of the cache does it: put again what another process evicted before it was held."""
    with ExitStack() as stack:
        while True:
            stored = put(cache, files)
            with suppress(AdapterNotFound):
                stack.enter_context(cache.hold(stored.id))
                break
        yield stored


def test_two_processes_share_one_cache(tmp_path: Path) -> None:
    with writer(tmp_path / "cache", 800_000, 1), writer(tmp_path / "cache", 800_000, 2):
        cache = DiskCache(tmp_path / "cache", 800_000)
        with put_and_hold(cache, blob(0)) as mine:
            seen: set[str] = set()
            while len(seen) <= 20:  # the others come and go, however slow this machine is
                time.sleep(0.02)
                cache.verify(mine.id)
                seen |= set(cache.ids())
            assert mine.id in cache.ids()


def test_lock_of_a_killed_holder_is_gone(tmp_path: Path) -> None:
    with writer(tmp_path / "cache", 800_000, 1) as process:
        time.sleep(0.05)
        process.kill()
        process.wait()
    descriptor = os.open(tmp_path / "cache" / "objects", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)
