"""The same, from outside and below Python: strace ends the process, or fails a call, in LMDB too.

strace counts per thread, and LMDB's writes are made by the thread that appends: the main one here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fire.script import Facts, prepare
from tests.fire.sweep import judge
from tests.store import cluster

DATA = "views/host-1/data.mdb"
HEAD, PAGES, SYNC = "pwrite64", "writev", "fdatasync"  # how LMDB commits, backwards
KILL = "signal=SIGKILL"
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
    label = facts.labels[verb == "take_over"]
    paths = ["-P", f"{facts.place}/point/domains/{label.cluster_uuid}/{below}"] if below else []
    calls = fault.partition(":")[0]
    command = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={calls}", *paths]
    command += ["-e", f"inject={fault}"]
    command += [sys.executable, "-m", "tests.fire.script", verb, str(facts.place)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == ends, ended.stderr
    if ends == 1:
        assert "storage.errors.PointUnreachable" in ended.stderr
    judge(facts, verb, [])
