"""Some of the faults from below, chosen by hand, in each check; all of them: see below.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.view.view import View
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


_STATE = """
import sys
from storage.errors import StorageError
from storage.lmdb_env.kv import Store, Table
import msgspec
class Row(msgspec.Struct):
    number: int
table = Table("t", Row)
store = Store(sys.argv[1], [table])
kept = []
for number in range(5):
    try:
        with store.write() as change:
            change.put(table, str(number), Row(number))
        kept.append(str(number))
    except StorageError as error:
        print(type(error).__name__)
    with store.read() as state:
        assert [key for key, _ in state.rows(table)] == kept
store.close()
again = Store(sys.argv[1], [table])
with again.read() as state:
    assert [key for key, _ in state.rows(table)] == kept
"""


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (f"{HEAD}:error=EIO:when=4", ["PointUnreachable"]),
        (f"{HEAD}:error=ENOSPC:when=5", ["PointFull"]),
        (f"{HEAD}:error=EIO:when=5..8", ["PointUnreachable"] * 2),
        (f"{SYNC}:error=EIO:when=3", ["PointUnreachable"]),
    ],
)
def test_the_state_goes_on_after_a_head_page_that_could_not_be_written(
    tmp_path: Path, fault: str, told: list[str]
) -> None:
    """Not just the next writes were refused: reads, too, and so each call of the API."""
    _require_told(_STATE, tmp_path / "state", fault, told)


def _require_told(script: str, directory: Path, fault: str, told: list[str]) -> None:
    """The script ends well and says this, when LMDB's calls on the file there meet the fault."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    directory.mkdir(exist_ok=True)
    calls = ["-e", f"trace={fault.partition(':')[0]}", "-e", f"inject={fault}"]
    command = ["strace", "-f", "-o", "/dev/null", "-P", f"{directory}/data.mdb", *calls]
    command += [sys.executable, "-c", script, str(directory)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.split()) == (0, told), ended.stderr


_VIEW = """
import sys
from storage.errors import StorageError
from storage.view.view import View
view = View(sys.argv[1], b"mine")
kept = {}
for number in range(5):
    key = b"%d" % number
    try:
        view.update(lambda state: state.table("chunks").put(key, bytes(16)))
        kept[key] = bytes(16)
    except StorageError as error:
        print(type(error).__name__)
    with view.read() as state:
        assert dict(state.table("chunks").scan()) == kept
view.close(seal=True)
with View(sys.argv[1], b"mine").read() as state:
    assert dict(state.table("chunks").scan()) == kept
"""


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (f"{HEAD}:error=EIO:when=1", ["PointUnreachable"]),
        (f"{HEAD}:error=ENOSPC:when=1..4", ["PointFull"] * 2),
        (f"{SYNC}:error=EIO:when=3", ["PointUnreachable"]),
    ],
)
def test_a_view_is_read_after_a_head_page_that_could_not_be_written(
    tmp_path: Path, fault: str, told: list[str]
) -> None:
    """It was opened anew by the next update; but who looks at a point reads first."""
    View(str(tmp_path / "view"), b"mine").close()
    _require_told(_VIEW, tmp_path / "view", fault, told)
