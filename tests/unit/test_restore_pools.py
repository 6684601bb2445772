"""engine.restore: pools that are full, that fail, and that can't do what others can."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from engine.errors import PoolFull, PoolUnreachable
from engine.jobs.jobs import JobContext
from engine.restore.restore import RestoreDisk, run_restore
from engine.snapshot.snapshot import RESTORES
from storage.files.fs import Buffer, OsFs
from storage.format.manifests import PAGE_ENTRIES
from tests.conftest import LoopFs
from tests.rig import Rig, random_bytes, sparse, write_at
from tests.unit.test_restore import names, open_sessions, volume

CHUNK = 64 << 10
MIB = 1 << 20


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
