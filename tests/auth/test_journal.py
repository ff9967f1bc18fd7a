"""The mapped file of what running requests use: what a dead process leaves is read as it was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from loraplex.auth.errors import UsageUnrecorded
from loraplex.auth.ledger.journal import Journal, fitting, leftovers
from loraplex.auth.metering import COMPLETED, INTERRUPTED, UsageRecord


def record(name: str = "r1", **changes: object) -> UsageRecord:
    made = UsageRecord(
        request_id=name,
        trace_id="req_1",
        route="/v1/completions",
        tenant_id="tenant_1",
        key_id="key_1",
        model="base",
        adapter_id="",
        num_prompt_tokens=7,
        began_at=1_800_014_400.25,
    )
    return msgspec.structs.replace(made, **changes)


def left(directory: Path) -> list[UsageRecord]:
    """What dead processes left."""
    return [found for leftover in leftovers(directory) for found in leftover.records()[0]]


def abandon(journal: Journal) -> None:
    """What the end of a process does: the lock goes, nothing is written."""
    journal._unmap()
    journal._file.close()


def test_running_request_is_left_with_what_it_has_used(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(record("silent"))
    slot = journal.begin(record("spoke", model="mödel/😀"))
    slot.progress(1, 2)
    slot.progress(5, 2)
    abandon(journal)
    silent, spoke = left(tmp_path)
    assert silent == record("silent", outcome=INTERRUPTED, num_prompt_tokens=0)  # gave nothing, costs nothing
    assert spoke.first_token_at is not None
    expected = {"model": "mödel/😀", "num_completion_tokens": 5, "num_cached_tokens": 2, "outcome": INTERRUPTED}
    assert spoke == record("spoke", first_token_at=spoke.first_token_at, **expected)


def test_settled_request_is_left_as_it_was_settled(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    final = record(
        num_completion_tokens=3, first_token_at=1_800_014_401.5, ended_at=1_800_014_402.125, outcome=COMPLETED
    )
    journal.begin(record())
    journal.settle(final)
    abandon(journal)
    assert left(tmp_path) == [final]


def test_freed_slot_is_not_left_and_is_used_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in range(3000):  # more than there are slots at first
        journal.begin(record(f"r{number}"))
        journal.free([f"r{number}"])
    (file,) = tmp_path.iterdir()
    size = file.stat().st_size
    journal.begin(record("last"))
    abandon(journal)
    assert [found.request_id for found in left(tmp_path)] == ["last"]
    assert file.stat().st_size == size


def test_journal_grows_and_keeps_what_it_holds(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    slots = [journal.begin(record(f"r{number}", num_prompt_tokens=number)) for number in range(5000)]
    for number, slot in enumerate(slots):
        slot.progress(number + 1, 0)
    for number in range(0, 5000, 2):
        slots[number].progress(number + 2, 0)
    abandon(journal)
    found = {each.request_id: (each.num_prompt_tokens, each.num_completion_tokens) for each in left(tmp_path)}
    assert found == {f"r{number}": (number, number + 2 - number % 2) for number in range(5000)}


def test_full_disk_refuses_the_request_and_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    slots = [journal.begin(record(f"r{number}")) for number in range(1024)]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UsageUnrecorded):
        journal.begin(record("one-more"))
    slots[0].progress(9, 0)
    journal.free(["r1"])
    journal.begin(record("fits"))
    abandon(journal)
    found = {each.request_id: each.num_completion_tokens for each in left(tmp_path)}
    assert found["r0"] == 9
    assert "fits" in found
    assert "one-more" not in found


def test_file_of_a_living_process_is_nobody_elses(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(record())
    assert list(leftovers(tmp_path)) == []
    code = "import sys, pathlib; from loraplex.auth.ledger.journal import leftovers; " \
           "print(len(list(leftovers(pathlib.Path(sys.argv[1])))))"  # fmt: skip
    shown = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert shown.stdout == "0\n"
    abandon(journal)
    assert len(list(leftovers(tmp_path))) == 1


def test_close_leaves_a_file_only_for_what_is_not_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(record())
    journal.free(["r1"])
    journal.close()
    assert list(tmp_path.iterdir()) == []
    journal = Journal(tmp_path)
    journal.begin(record())
    journal.close()
    assert [each.request_id for each in left(tmp_path)] == ["r1"]


def test_damaged_slot_costs_its_own_request_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for name in ("r1", "r2", "r3"):
        journal.begin(record(name))
    abandon(journal)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    at = data.index(b"r2")
    data[at] ^= 0xFF
    file.write_bytes(data)
    ((found, num_damaged),) = [leftover.records() for leftover in leftovers(tmp_path)]
    assert [each.request_id for each in found] == ["r1", "r3"]
    assert num_damaged == 1


def test_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.slots").write_bytes(b"something else" * 1000)
    for leftover in leftovers(tmp_path):
        with pytest.raises(ValueError, match="layout"):
            leftover.records()
        assert leftover.set_aside().exists()
    assert list(leftovers(tmp_path)) == []


def test_fitting_leaves_no_text_that_a_database_refuses() -> None:
    long = fitting(record("i" * 99, model="m" * 999, route="/\0x", trace_id="\ud800"))
    assert (len(long.request_id), len(long.model), long.route, long.trace_id) == (64, 256, "/x", "?")
    good = record()
    assert fitting(good) is good


def test_longest_record_fits_its_slot(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    texts = ("request_id", "trace_id", "route", "tenant_id", "key_id", "model", "adapter_id")
    longest = fitting(record(**dict.fromkeys(texts, "😀" * 300)))
    for number in range(3):
        journal.begin(msgspec.structs.replace(longest, request_id=f"{number}" + longest.request_id[1:]))
    abandon(journal)
    found = left(tmp_path)
    assert [each.request_id[0] for each in found] == ["0", "1", "2"]
    assert found[0].model == longest.model


_VICTIM = """
import sys, pathlib, os
from loraplex.auth.ledger.journal import Journal
from test_journal import record
journal = Journal(pathlib.Path(sys.argv[1]))
slot = journal.begin(record("r", num_prompt_tokens=1))
os.write(1, b"\\n")
count = 0
while True:
    count += 1
    slot.progress(count, 0)
    os.write(1, b"x")  # the token is given out
"""


@pytest.mark.parametrize("seed", range(3))
def test_killed_process_leaves_every_token_it_gave_out_and_at_most_one_more(tmp_path: Path, seed: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _VICTIM, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])},
    ) as victim:
        assert victim.stdout is not None
        given = len(victim.stdout.read(1 + random.Random(seed).randrange(1, 5000))) - 1
        victim.send_signal(signal.SIGKILL)
        given += len(victim.stdout.read())
    (found,) = left(tmp_path)
    assert found.num_completion_tokens - given in (0, 1)
