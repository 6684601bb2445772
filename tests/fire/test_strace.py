"""Some of the faults from below, chosen by hand, in each check; all of them: see below.py."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fire.below import CALLS, DATA, KILL, injected
from tests.fire.script import Facts, prepare
from tests.fire.sweep import judge
from tests.store import cluster

HEAD, PAGES, SYNC = CALLS
FAULTS = [
    ("full", "", f"link,linkat:{KILL}:when=2", -9),
    ("incremental", DATA, f"{PAGES}:{KILL}:when=1", -9),
    ("incremental", DATA, f"{SYNC}:{KILL}:when=2", -9),
    ("incremental", DATA, f"{HEAD}:{KILL}:when=2", -9),
    ("delete", DATA, f"{HEAD}:{KILL}:when=1", -9),
    ("delete", DATA, f"{SYNC}:{KILL}:when=3", -9),
    ("restore", DATA, f"{PAGES}:{KILL}:when=2", -9),
    ("take_over", DATA, f"{HEAD}:{KILL}:when=2", -9),
    ("incremental", DATA, f"{HEAD}:error=EIO:when=1", 0),
    ("incremental", DATA, f"{HEAD}:error=EIO:when=1+", 1),
    ("incremental", DATA, f"{SYNC}:error=EIO:when=2", 0),
    ("delete", DATA, f"{PAGES}:error=ENOSPC:when=2", 0),
    ("delete", DATA, f"{PAGES}:error=EDQUOT:when=4", 0),
]


@pytest.fixture
def facts() -> Iterator[Facts]:
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vmkeep-strace-", dir=parent) as path:
        yield prepare(Path(path), [cluster("a"), cluster("b")])


@pytest.mark.parametrize(("verb", "below", "fault", "ends"), FAULTS)
def test_a_fault_from_below(facts: Facts, verb: str, below: str, fault: str, ends: int) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    ended = injected(facts, verb, below, fault)
    assert ended.status == ends, ended.errors
    if ends == 1:
        assert "storage.errors.PointUnreachable" in ended.errors
    judge(facts, verb, ended.told)
