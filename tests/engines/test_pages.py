"""Memory by its pages."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from loraplex.engines.pages import give_back, in_large_pages, populate

PAGE = mmap.PAGESIZE
LARGE = 2**21
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_memory_begins_with_zeros_on_a_page() -> None:
    memory = in_large_pages(3 * PAGE + 5)
    assert (memory.nbytes, memory.data_ptr() % PAGE) == (3 * PAGE + 5, 0)
    assert not memory.any()
    assert in_large_pages(0).nbytes == 0


def test_populating_changes_nothing() -> None:
    memory = in_large_pages(4 * PAGE).fill_(7)
    populate(memory[PAGE + 1 : 2 * PAGE])
    populate(memory[:0])
    assert (memory == 7).all()


def test_only_pages_that_are_given_back_whole_are_lost() -> None:
    memory = in_large_pages(4 * PAGE).fill_(7)
    give_back(memory[PAGE - 1 : 3 * PAGE + 1])
    give_back(memory[10:20])
    lost = memory[PAGE : 3 * PAGE]
    assert not lost.any()
    assert (memory[:PAGE] == 7).all()
    assert (memory[3 * PAGE :] == 7).all()


@pytest.mark.skipif(
    not _ENABLED.is_file() or "[never]" in _ENABLED.read_text(), reason="the system gives no large pages"
)
def test_pages_are_large_where_the_system_has_them() -> None:
    """By what Linux tells of the mapping."""
    memory = in_large_pages(8 * LARGE).fill_(1)
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            first, end = (int(number, 16) for number in words[0].split("-"))
            inside = first <= memory.data_ptr() < end
        elif inside and words[0] == "VmFlags:":
            assert "hg" in words
            return
    pytest.fail("no mapping has it")
