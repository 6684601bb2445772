"""storage.files.memory: buffers of whole huge pages."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from storage.files.memory import large_buffer

SIZE_BYTES = (4 << 20) + 1
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def mapping_of(buffer: memoryview) -> str:
    """What the kernel says of the mapping in which the buffer begins."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    for entry in re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M
    ):
        if entry:
            start, end = (int(word, 16) for word in entry.split(maxsplit=1)[0].split("-"))
            if start <= address < end:
                return entry
    raise AssertionError("no mapping has the buffer")


def test_it_has_the_size_and_is_zero() -> None:
    buffer = large_buffer(SIZE_BYTES)
    assert buffer.nbytes == SIZE_BYTES
    assert bytes(buffer) == bytes(SIZE_BYTES)
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % 4096 == 0


def test_it_is_private_so_that_it_may_have_huge_pages() -> None:
    if not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text():
        pytest.skip("no huge pages here")
    buffer = large_buffer(SIZE_BYTES)
    entry = mapping_of(buffer)
    flags = re.search(r"^VmFlags: (.*)$", entry, re.M)
    assert flags is not None
    assert "hg" in flags[1].split()  # asked for
    assert "sh" not in flags[1].split()  # and not refused, as they are for shared memory


def test_a_fork_does_not_share_it() -> None:
    """Reading from a device into private memory while it is being forked loses what was read."""
    flags = re.search(r"^VmFlags: (.*)$", mapping_of(large_buffer(SIZE_BYTES)), re.M)
    assert flags is not None
    assert "dc" in flags[1].split()
