"""engine.restore: hidden names, names of its own, and what a killed restore leaves of them."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.errors import Conflict
from engine.jobs.jobs import JobContext
from engine.restore.new_volume import unname_left
from engine.restore.restore import RestoreDisk, run_restore
from engine.snapshot.snapshot import RESTORES, clear_leftovers
from tests.rig import Rig, random_bytes
from tests.unit.test_restore import names, volume

MIB = 1 << 20


_KILLED = """
import os, signal, sys
from pathlib import Path
from engine.jobs.jobs import JobContext
from engine.restore.restore import RestoreDisk, run_restore
from tests.rig import Rig
class Dies(JobContext):
    def add(self, **counts):
        os.kill(os.getpid(), signal.SIGKILL)
with Rig(Path(sys.argv[1])) as rig:
    (rig.pool / "v").write_bytes(b"x" * 5_000_000)
    made = rig.back_up(rig.pool / "v")
    disks = [RestoreDisk(made.disks["vda"], str(rig.pool / "n"))]
    run_restore(rig.domain, disks, Dies(), 2, backup=made.backup)
"""


def test_what_a_killed_restore_leaves_is_cleared(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    pool = tmp_path / "pool"
    assert sorted(os.listdir(pool)) == [RESTORES, "v"]
    assert clear_leftovers(str(pool)) == 1
    assert sorted(os.listdir(pool)) == ["v"]


def test_the_names_of_a_restore_that_goes_on_are_left_alone(rig: Rig) -> None:
    """Another service has the same pool, and a killed restore of a volume of the same name."""
    made = rig.back_up(volume(rig, "v", b"x" * MIB))
    path = str(rig.pool / "n")
    left: list[bool] = []
    run_restore(
        rig.domain,
        [RestoreDisk(made.disks["vda"], path)],
        JobContext(),
        2,
        backup=made.backup,
        complete=lambda: left.append(unname_left(path)),
    )
    assert left == [False]
    assert Path(path).read_bytes() == b"x" * MIB
    assert names(rig) == ["n", "v"]


def test_the_name_of_a_killed_restore_is_taken_back_on_nfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client locks a file for writers only where it is open for writing (flock(2))."""
    flock = fcntl.flock

    def as_on_nfs(fd: int, wish: int) -> None:
        if wish & fcntl.LOCK_EX and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(fd, wish)

    (tmp_path / RESTORES).mkdir()
    (tmp_path / "n").write_bytes(b"x")
    os.link(tmp_path / "n", tmp_path / RESTORES / "a")
    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    assert unname_left(str(tmp_path / "n"))
    assert os.listdir(tmp_path) == [RESTORES]


def test_a_link_in_the_place_of_the_hidden_names_says_nothing(tmp_path: Path) -> None:
    theirs, pool = tmp_path / "theirs", tmp_path / "pool"
    theirs.mkdir()
    pool.mkdir()
    (theirs / "a").write_bytes(b"x")
    os.link(theirs / "a", pool / "n")
    (pool / RESTORES).symlink_to(theirs)
    assert not unname_left(str(pool / "n"))
    assert (pool / "n").read_bytes() == b"x"


def test_what_fails_when_all_is_named_takes_the_names_back(rig: Rig) -> None:
    made = rig.back_up(volume(rig, "v", b"1"), volume(rig, "w", b"2"))
    disks = [RestoreDisk(made.disks[t], str(rig.pool / f"n-{t}")) for t in ("vda", "vdb")]

    def refused() -> None:
        assert names(rig) == [RESTORES, "n-vda", "n-vdb", "v", "w"]
        raise Conflict("name_taken", "no machine")

    with pytest.raises(Conflict, match="no machine"):
        run_restore(rig.domain, disks, JobContext(), 2, backup=made.backup, complete=refused)
    assert names(rig) == ["v", "w"]


def test_a_running_restore_is_safe_from_clear_leftovers(rig: Rig) -> None:
    class Clears(JobContext):
        def add(self, **counts: int) -> None:
            super().add(**counts)
            assert clear_leftovers(str(rig.pool)) == 0

    content = random_bytes(MIB)
    made = rig.back_up(volume(rig, "v", content))
    disks = [RestoreDisk(made.disks["vda"], str(rig.pool / "n"))]
    run_restore(rig.domain, disks, Clears(), 2, backup=made.backup)
    assert (rig.pool / "n").read_bytes() == content


def test_many_restores_into_one_pool_at_once(rig: Rig) -> None:
    made = rig.back_up(volume(rig, "v", b"x" * 1000))
    failures: list[BaseException] = []

    def loop(name: str) -> None:
        try:
            for number in range(10):
                path = rig.pool / f"{name}-{number}"
                disks = [RestoreDisk(made.disks["vda"], str(path))]
                run_restore(rig.domain, disks, JobContext(), 1, backup=made.backup)
                assert path.read_bytes() == b"x" * 1000
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=loop, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_hidden_directory_may_vanish_at_any_moment(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another restore, just done, removes it when it is empty."""
    made = rig.back_up(volume(rig, "v", b"x"))
    whole = os.mkdir
    vanished: list[str] = []

    def mkdir(path: str, mode: int = 0o777) -> None:
        whole(path, mode)
        if path.endswith(RESTORES) and len(vanished) < 3:
            vanished.append(path)
            os.rmdir(path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert rig.restore(made).read_bytes() == b"x"
    assert len(vanished) == 3
