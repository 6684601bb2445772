"""engine.restore.restore: exact, sparse, all or nothing. Against the real storage."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

import pytest

from engine.errors import Cancelled, Conflict
from engine.jobs.jobs import JobContext
from engine.restore.restore import LOOSE_PIECES, Gaps, RestoreDisk, run_restore
from storage.errors import Damaged, NotOnPoint, SessionEnded
from storage.view import tables
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


def test_what_is_missing_of_a_disk_that_is_lost_takes_little_memory() -> None:
    gaps, count = Gaps("d"), 4 * LOOSE_PIECES
    for at in range(count):
        gaps.add((at ^ 1) * CHUNK, CHUNK)  # a little out of order, as from several threads
    assert len(gaps._pieces) <= LOOSE_PIECES + 4
    assert gaps.ranges() == [(0, count * CHUNK)]
    assert gaps.size_bytes == count * CHUNK


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
