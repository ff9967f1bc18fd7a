"""Memory by its pages: large ones, of which a CPU looks up fewer, and what the kernel is told of them."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import torch
from torch import Tensor

_libc = ctypes.CDLL(None)
_POPULATE_WRITE = 23  # Linux 5.14's MADV_POPULATE_WRITE; changes no bytes


def in_large_pages(size: int) -> Tensor:
    """So many bytes of a CPU's memory, zeros, that nothing else shares pages with. Shape [size].

    In pages as usual where the system has no others; they are backed when they are first written to.
    """
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    memory = torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        _advise(memory.data_ptr(), size, mmap.MADV_HUGEPAGE)
    return memory


def populate(memory: Tensor) -> None:
    """Have the kernel back the pages that it lies in, or do nothing. Any thread may, whoever uses them."""
    first = memory.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _advise(first, memory.data_ptr() + memory.nbytes - first, _POPULATE_WRITE)


def give_back(memory: Tensor) -> None:
    """The pages that it has to itself, which nobody may read any more: a file's are read anew, others are zeros."""
    first = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (memory.data_ptr() + memory.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED"):
        _advise(first, end - first, mmap.MADV_DONTNEED)


def unwritten_files() -> list[range]:
    """The addresses of files that this process has mapped and wrote nothing to: what is given back is read anew.

    None where the system does not tell.
    """
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:  # another system, or a sandbox that hides it
        return []
    found: list[range] = []
    for line in lines:
        words = line.split()
        if not words[0].endswith(":"):  # begin-end, rights, offset, device, inode, path
            begin, end = (int(address, 16) for address in words[0].split("-"))
            place = range(begin, end) if int(words[4]) else None
        elif words[0] == "Anonymous:" and words[1] == "0" and place:
            found.append(place)
    return found


def _advise(first: int, size: int, advice: int) -> None:
    """A kernel that does not know the advice says so, and nothing is lost."""
    if size > 0:
        _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), advice)
