"""engine.restore.restore: exact, sparse, all or nothing. Against the real storage."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from engine.errors import Cancelled, Conflict, PoolFull, PoolUnreachable
from engine.jobs.jobs import JobContext
from engine.restore.new_volume import unname_left
from engine.restore.restore import LOOSE_PIECES, Gaps, RestoreDisk, run_restore
from engine.snapshot.snapshot import RESTORES, clear_leftovers
from storage.errors import Damaged, NotOnPoint, SessionEnded
from storage.files.fs import Buffer, OsFs
from storage.format.manifests import PAGE_ENTRIES
from storage.view import tables
from tests.conftest import LoopFs
from tests.rig import Made, Rig, allocated_bytes, random_bytes, sparse, write_at

CHUNK = 64 << 10
MIB = 1 << 20


def volume(rig: Rig, name: str, content: bytes) -> Path:
    path = rig.pool / name
    path.write_bytes(content)
    return path


def names(rig: Rig) -> list[str]:
    return sorted(os.listdir(rig.pool))


def open_sessions(rig: Rig) -> int:
    with rig.domain.view.read() as state:
        return len(list(tables.sessions.scan(state)))


@pytest.mark.parametrize("size_bytes", [0, 1, CHUNK - 1, CHUNK, 20 * CHUNK + 513])
@pytest.mark.parametrize("workers", [1, 4])
def test_same_bytes_and_size(rig: Rig, size_bytes: int, workers: int) -> None:
    content = random_bytes(size_bytes)
    made = rig.back_up(volume(rig, "v", content))
    path = rig.restore(made, workers=workers)
    assert path.read_bytes() == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names(rig) == [path.name, "v"]
    assert open_sessions(rig) == 0


def test_a_chunk_in_many_places_after_the_disk_s_short_end(rig: Rig) -> None:
    """The end lies in an older pack, so it is written before; the chunk is decompressed once."""
    path = sparse(rig.pool / "v", 400 * CHUNK + 2 * 4096)
    write_at(path, 400 * CHUNK, random_bytes(2 * 4096))
    first = rig.back_up(path)
    chunk = b"".join(b"%8d" % at for at in range(CHUNK // 8))
    write_at(path, 0, chunk * 200)
    made = rig.back_up(path, parent=first)
    assert rig.restore(made, workers=1).read_bytes() == path.read_bytes()


def test_holes_and_zeros_take_no_room(rig: Rig) -> None:
    path = sparse(rig.pool / "v", 10 << 40)
    write_at(path, 5 << 40, random_bytes(CHUNK))
    write_at(path, 7 << 40, bytes(MIB))
    made = rig.back_up(path)
    restored = rig.restore(made)
    assert restored.stat().st_size == 10 << 40
    assert allocated_bytes(restored) < 4 * CHUNK
    with restored.open("rb") as file:
        file.seek(5 << 40)
        assert file.read(CHUNK) == random_bytes(CHUNK)


def test_progress_ends_at_the_capacity(rig: Rig) -> None:
    made = rig.back_up(sparse(volume(rig, "v", b""), 3 * MIB), volume(rig, "w", b"x" * MIB))
    context = JobContext()
    disks = [RestoreDisk(made.disks[t], str(rig.pool / f"n-{t}")) for t in ("vda", "vdb")]
    run_restore(rig.domain, disks, context, 2, backup=made.backup)
    progress = context.progress()
    assert (progress.bytes_total, progress.bytes_restored) == (4 * MIB, 4 * MIB)


@pytest.mark.parametrize("what", ["file", "link"])
def test_a_volume_is_never_overwritten(rig: Rig, what: str) -> None:
    made = rig.back_up(volume(rig, "v", b"new"))
    taken = rig.pool / "taken"
    if what == "file":
        taken.write_bytes(b"old")
    else:
        taken.symlink_to("nowhere")
    with pytest.raises(Conflict) as caught:
        run_restore(
            rig.domain,
            [RestoreDisk(made.disks["vda"], str(taken))],
            JobContext(),
            2,
            backup=made.backup,
        )
    assert caught.value.code == "name_taken"
    assert names(rig) == ["taken", "v"]
    assert taken.is_symlink() or taken.read_bytes() == b"old"
    assert open_sessions(rig) == 0


class TakesName(JobContext):
    """Somebody makes a volume of that name when the restore is nearly done."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def add(self, **counts: int) -> None:
        super().add(**counts)
        self._path.write_bytes(b"theirs")


def test_all_disks_or_none(rig: Rig) -> None:
    made = rig.back_up(volume(rig, "v", b"1"), volume(rig, "w", b"2"))
    disks = [RestoreDisk(made.disks[t], str(rig.pool / f"n-{t}")) for t in ("vda", "vdb")]
    with pytest.raises(Conflict, match="n-vdb"):
        run_restore(rig.domain, disks, TakesName(rig.pool / "n-vdb"), 2, backup=made.backup)
    assert names(rig) == ["n-vdb", "v", "w"]
    assert (rig.pool / "n-vdb").read_bytes() == b"theirs"


def test_both_disks_to_one_name(rig: Rig) -> None:
    made = rig.back_up(volume(rig, "v", b"1"), volume(rig, "w", b"2"))
    disks = [RestoreDisk(made.disks[t], str(rig.pool / "same")) for t in ("vda", "vdb")]
    with pytest.raises(Conflict):
        run_restore(rig.domain, disks, JobContext(), 2, backup=made.backup)
    assert names(rig) == ["v", "w"]


class CancelledLater(JobContext):
    """Is told to end after its n-th check."""

    def __init__(self, checks: int) -> None:
        super().__init__()
        self._left = checks

    def check(self) -> None:
        self._left -= 1
        if self._left < 0:
            self.cancel(Cancelled("cancelled", "enough"))
        super().check()


@pytest.mark.parametrize("checks", [0, 1, 2])
def test_a_cancelled_restore_leaves_nothing(rig: Rig, checks: int) -> None:
    made = rig.back_up(volume(rig, "v", random_bytes(20 * MIB)))
    disks = [RestoreDisk(made.disks["vda"], str(rig.pool / "n"))]
    with pytest.raises(Cancelled):
        run_restore(rig.domain, disks, CancelledLater(checks), 2, backup=made.backup)
    assert names(rig) == ["v"]
    assert open_sessions(rig) == 0


def test_a_flipped_bit_on_the_point_is_named_and_leaves_nothing(rig: Rig) -> None:
    made = rig.back_up(volume(rig, "v", random_bytes(MIB)))
    (pack,) = rig.point_path.rglob("packs/*/*")
    pack.chmod(0o600)
    content = bytearray(pack.read_bytes())
    content[300_000] ^= 1
    pack.write_bytes(content)
    with pytest.raises(Damaged, match=str(pack)):
        rig.restore(made)
    assert names(rig) == ["v"]


def test_a_backup_that_is_gone(rig: Rig) -> None:
    made = rig.back_up(volume(rig, "v", b"x"))
    rig.domain.forget([made.backup])
    with pytest.raises(NotOnPoint):
        rig.restore(made)
    assert names(rig) == ["v"]


def _reopened(_: OsFs, fd: int, _path: str) -> int:
    """open_direct wherever the tests run."""
    return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)


def _is_restores(fd: int) -> bool:
    return f"/{RESTORES}/" in os.readlink(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_pool_by_errno(rig: Rig, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = rig.back_up(volume(rig, "v", random_bytes(MIB)))
    whole = OsFs.pwrite

    def pwrite(self: OsFs, fd: int, pieces: Sequence[Buffer], offset: int) -> int:
        if _is_restores(fd):
            raise OSError(number, os.strerror(number))
        return whole(self, fd, pieces, offset)

    monkeypatch.setattr(OsFs, "pwrite", pwrite)
    with pytest.raises(PoolFull):
        rig.restore(made)
    assert names(rig) == ["v"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_can_be_set_aside(rig: Rig, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = rig.back_up(volume(rig, "v", random_bytes(MIB)))

    def set_aside(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(OsFs, "open_direct", _reopened)
    monkeypatch.setattr(OsFs, "set_aside", set_aside)
    with pytest.raises(PoolFull):
        rig.restore(made)
    assert names(rig) == ["v"]


def test_room_is_set_aside_for_what_is_written_and_no_more(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written. The end is not rounded up: the file would grow."""
    path = sparse(rig.pool / "v", 3 * PAGE_ENTRIES * CHUNK + 5 * CHUNK + 513)
    for at, size_bytes in ((0, 2 * CHUNK), (2 * PAGE_ENTRIES * CHUNK - 1, 2), (4 * CHUNK, CHUNK)):
        write_at(path, at, random_bytes(size_bytes))
    end = 3 * PAGE_ENTRIES * CHUNK + 5 * CHUNK
    write_at(path, end, random_bytes(513))
    made = rig.back_up(path)
    asked: list[tuple[int, int]] = []
    whole = OsFs.pwrite

    def set_aside(_: OsFs, fd: int, offset: int, size_bytes: int) -> None:
        assert os.fstat(fd).st_blocks == 0
        asked.append((offset, size_bytes))

    def pwrite(self: OsFs, fd: int, pieces: Sequence[Buffer], offset: int) -> int:
        assert len(asked) == 5 or not _is_restores(fd)
        return whole(self, fd, pieces, offset)

    with monkeypatch.context() as patch:
        patch.setattr(OsFs, "open_direct", _reopened)
        patch.setattr(OsFs, "set_aside", set_aside)
        patch.setattr(OsFs, "pwrite", pwrite)
        assert rig.restore(made).read_bytes() == path.read_bytes()
    boundary = 2 * PAGE_ENTRIES * CHUNK
    assert asked == [
        (0, 2 * CHUNK),
        (4 * CHUNK, CHUNK),
        (boundary - CHUNK, CHUNK),
        (boundary, CHUNK),
        (end, 513),
    ]


@pytest.mark.parametrize("is_taken", [True, False])
def test_all_disks_have_room_before_the_first_write_to_any(
    rig: Rig, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is told so where the file system did it, not where it said yes to no effect."""
    made = rig.back_up(volume(rig, "v", random_bytes(MIB)), volume(rig, "w", random_bytes(MIB, 1)))
    heard: list[list[int]] = []
    whole = OsFs.pwrite

    def has_room() -> None:
        hidden = [path.stat() for path in (rig.pool / RESTORES).iterdir()]
        heard.append([found.st_blocks * 512 for found in hidden])

    def pwrite(self: OsFs, fd: int, pieces: Sequence[Buffer], offset: int) -> int:
        assert bool(heard) == is_taken or not _is_restores(fd)
        return whole(self, fd, pieces, offset)

    disks = [RestoreDisk(made.disks[name], str(rig.pool / name)) for name in ("vda", "vdb")]
    monkeypatch.setattr(OsFs, "open_direct", _reopened)
    monkeypatch.setattr(OsFs, "pwrite", pwrite)
    if not is_taken:
        monkeypatch.setattr(OsFs, "set_aside", lambda *_: None)
    context = JobContext()
    run_restore(rig.domain, disks, context, 2, backup=made.backup, has_room=has_room)
    assert [[size >= MIB for size in sizes] for sizes in heard] == [[True, True]] * is_taken
    assert (rig.pool / "vdb").read_bytes() == (rig.pool / "w").read_bytes()


class FailsAt:
    """The `n`-th call that changes the pool fails. `met`: there was one."""

    CALLS = ("open", "mkdir", "ftruncate", "pwritev", "fsync", "link")

    def __init__(self, patch: pytest.MonkeyPatch, pool: Path, n: int, number: int) -> None:
        self.met = False
        self._pool, self._left, self._number = str(pool), n, number
        for name in self.CALLS:
            patch.setattr(os, name, partial(self._call, getattr(os, name)))

    def _call(
        self, real: Callable[..., object], place: str | int, *args: object, **kw: object
    ) -> object:
        path = place if isinstance(place, str) else os.readlink(f"/proc/self/fd/{place}")
        if path.startswith(self._pool):
            self._left -= 1
            if not self._left:
                self.met = True
                raise OSError(self._number, os.strerror(self._number), path)
        return real(place, *args, **kw)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_any_call_on_the_pool_fails(rig: Rig, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so and leaves nothing, not even a name whose durability is in doubt."""
    content = random_bytes(5 * CHUNK + 513)
    made = rig.back_up(volume(rig, "v", content))
    expected = PoolUnreachable if number == errno.EIO else PoolFull
    refused = 0
    for n in range(1, 100):
        with monkeypatch.context() as patch:
            pool = FailsAt(patch, rig.pool, n, number)
            with contextlib.suppress(expected):
                restored = rig.restore(made, workers=1)
                assert restored.read_bytes() == content
                restored.unlink()
                if not pool.met:
                    break
        refused += 1
        assert names(rig) == ["v"]
        assert open_sessions(rig) == 0
    assert not pool.met
    assert refused > 6
    assert rig.restore(made).read_bytes() == content


@pytest.mark.parametrize("kept_bytes", [0, 4096])
def test_o_direct_refused_or_cut_short(
    rig: Rig, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random_bytes(20 * CHUNK + 513)
    made = rig.back_up(volume(rig, "v", content))
    whole = OsFs.pwrite

    def pwrite(self: OsFs, fd: int, pieces: Sequence[Buffer], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            whole(self, fd, [memoryview(pieces[0])[:kept_bytes]], offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return whole(self, fd, pieces, offset)

    monkeypatch.setattr(OsFs, "pwrite", pwrite)
    assert rig.restore(made).read_bytes() == content


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_a_full_pool_for_real(loop_fs: LoopFs, tmp_path: Path, kind: str) -> None:
    small = loop_fs(kind, 320 * MIB if kind == "xfs" else 64 * MIB)
    before = os.statvfs(small).f_bavail
    with Rig(tmp_path) as rig:
        large = volume(rig, "v", random_bytes(400 * MIB))
        made = rig.back_up(volume(rig, "u", random_bytes(MIB, 1)), large)
        disks = [RestoreDisk(uuid, str(small / name)) for name, uuid in made.disks.items()]
        context = JobContext()
        with pytest.raises(PoolFull):
            run_restore(rig.domain, disks, context, 2, backup=made.backup)
    assert context.progress().bytes_restored == 0  # it is known before the first byte
    assert [name for name in os.listdir(small) if name != "lost+found"] == []
    os.sync()
    assert os.statvfs(small).f_bavail * 1.01 >= before


def test_a_restore_whose_session_was_aborted_fails_loudly(rig: Rig) -> None:
    """Without its hold, what it read might have been deleted under it."""

    class Aborts(JobContext):
        def check(self) -> None:
            super().check()
            with rig.domain.view.read() as state:
                sessions = [session for session, _ in tables.sessions.scan(state)]
            for session in sessions:
                rig.domain.abort(session)

    made = rig.back_up(volume(rig, "v", b"x" * MIB))
    disks = [RestoreDisk(made.disks["vda"], str(rig.pool / "n"))]
    with pytest.raises(SessionEnded):
        run_restore(rig.domain, disks, Aborts(), 2, backup=made.backup)
    assert names(rig) == ["v"]


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


def test_what_is_missing_of_a_disk_that_is_lost_takes_little_memory() -> None:
    gaps, count = Gaps("d"), 4 * LOOSE_PIECES
    for at in range(count):
        gaps.add((at ^ 1) * CHUNK, CHUNK)  # a little out of order, as from several threads
    assert len(gaps._pieces) <= LOOSE_PIECES + 4
    assert gaps.ranges() == [(0, count * CHUNK)]
    assert gaps.size_bytes == count * CHUNK


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


def test_a_deleted_backup_can_be_restored_while_it_is_held(rig: Rig) -> None:
    """Forget and gc in the middle of a restore: the reader's hold keeps the data."""
    content = random_bytes(2 * MIB)

    class Deletes(JobContext):
        def check(self) -> None:
            super().check()
            with contextlib.suppress(NotOnPoint):
                rig.domain.forget([made.backup])
                rig.domain.reclaim()

    made: Made = rig.back_up(volume(rig, "v", content))
    disks = [RestoreDisk(made.disks["vda"], str(rig.pool / "n"))]
    run_restore(rig.domain, disks, Deletes(), 2, backup=made.backup)
    assert (rig.pool / "n").read_bytes() == content
    assert rig.domain.backups() == []
