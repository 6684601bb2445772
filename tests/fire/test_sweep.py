"""The process dies, or a call fails, at calls of each verb; all of them: see sweep.py."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.files.fs import OsFs
from tests.fire.script import PAST, VERBS, image, prepare
from tests.fire.sweep import FAULTS, sweep
from tests.store import cluster, load

# One in so many calls here, another one for each fault, and every call in `make soak`.
STRIDE = 47


@pytest.fixture
def memory() -> Iterator[Path]:
    """Thousands of fsyncs, and none of them is the point here."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vmkeep-sweep-", dir=parent) as path:
        yield Path(path)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_a_call(memory: Path, verb: str, fault: str) -> None:
    start = 1 + list(FAULTS).index(fault) * STRIDE // len(FAULTS)
    assert sweep(memory, verb, fault, STRIDE, start) >= 2


class ClosesBadly(OsFs):
    """Closing a pack that was read fails, as it may on NFS."""

    failed = 0

    def close(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        super().close(fd)
        if "/packs/" in path:
            self.failed += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)


def test_a_pack_that_was_read_is_closed_badly(memory: Path) -> None:
    """All of its bytes were there, and proved: there is nothing to tell."""
    facts, fs = prepare(memory, [cluster("a"), cluster("b")]), ClosesBadly()
    domain = facts.open(0, fs)
    assert load(domain, facts.past[-1]) == image(PAST - 1)
    assert fs.failed
    domain.close()
