"""engine.snapshot.tracking: each way that comparing clones could miss a change, on real disks."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from engine.snapshot import tracking
from engine.snapshot.baselines import Baselines, _Removal, open_baseline
from engine.snapshot.extents import Extent, clone_into, extent_map
from engine.snapshot.snapshot import SNAPSHOTS, clear_leftovers
from engine.snapshot.sources import Origin, VolumeSource
from storage.errors import PointFull
from tests.conftest import LoopFs
from tests.rig import Made, found_by, random_bytes, write_at
from tests.tracking_rig import (
    CHUNK,
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
    TrackedRig,
    clone_range,
    fallocate,
    notes,
    run,
    write_unsynced,
)

pytestmark = pytest.mark.root

FS_BYTES = 400 << 20
SIZE = 40 * CHUNK


@pytest.fixture(params=["xfs", "btrfs"])
def rig(request: pytest.FixtureRequest, loop_fs: LoopFs, tmp_path: Path) -> Iterator[TrackedRig]:
    yield from _rig(loop_fs(request.param, FS_BYTES), tmp_path)


@pytest.fixture
def xfs_rig(loop_fs: LoopFs, tmp_path: Path) -> Iterator[TrackedRig]:
    yield from _rig(loop_fs("xfs", FS_BYTES), tmp_path)


@pytest.fixture
def btrfs_rig(loop_fs: LoopFs, tmp_path: Path) -> Iterator[TrackedRig]:
    yield from _rig(loop_fs("btrfs", FS_BYTES), tmp_path)


def _rig(pool: Path, root: Path) -> Iterator[TrackedRig]:
    with TrackedRig(root, pool) as rig:
        rig.volume.write_bytes(random_bytes(SIZE))
        yield rig
        rig.state.close()


def next_is_tracked(rig: TrackedRig) -> None:
    """Backs up and asserts that the comparison was used and the restore is right."""
    made = rig.next()
    assert found_by(made) == "reflink", notes(made)
    assert rig.restored() == rig.volume.read_bytes()


def next_is_scanned(rig: TrackedRig, why: str) -> None:
    made = rig.next()
    assert found_by(made) == "scan"
    assert f"vda scanned: {why}" in notes(made)
    assert rig.restored() == rig.volume.read_bytes()


def compared(rig: TrackedRig, parent: Made, place: Path) -> str:
    """What the comparison says of the file there, as a clone of the rig's volume."""
    fd = os.open(place, os.O_RDONLY)
    origin = Origin(rig.row().inode, rig.row().generation)
    with contextlib.closing(VolumeSource(fd, str(rig.volume), origin=origin)) as clone:
        tracker = tracking.Tracker(rig.baselines, rig.row().vm_uuid, "next")
        return tracker.compare("vda", parent.disks["vda"], clone)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample is another cover: these tests go without it."""
    monkeypatch.setattr("engine.backup.sampling.FEWEST_CHUNKS", 0)
    monkeypatch.setattr("engine.backup.sampling.SHARE", 0.0)


class TestChanges:
    def test_only_the_changed_chunk_is_read(self, rig: TrackedRig) -> None:
        rig.next()
        write_at(rig.volume, 7 * CHUNK + 5, b"changed")
        next_is_tracked(rig)
        assert rig.last is not None
        progress = rig.last.context.progress()
        assert (progress.bytes_scanned, progress.bytes_read) == (SIZE, CHUNK)

    def test_nothing_changed(self, rig: TrackedRig) -> None:
        rig.next()
        next_is_tracked(rig)
        assert rig.last is not None
        assert rig.last.context.progress().bytes_read == 0

    def test_writes_that_are_not_synced(self, rig: TrackedRig) -> None:
        rig.next()
        write_unsynced(rig.volume, 3 * CHUNK, b"dirty")
        next_is_tracked(rig)

    def test_the_map_of_a_live_file_shows_them_too(self, rig: TrackedRig) -> None:
        with rig.volume.open("r+b", buffering=0) as file:
            os.fsync(file.fileno())
            with os.fdopen(os.open(rig.pool, os.O_TMPFILE | os.O_RDWR), "r+b") as clone:
                clone_into(clone.fileno(), file.fileno())
                file.seek(CHUNK)
                file.write(b"dirty")
                maps = [extent_map(one.fileno(), SIZE) for one in (file, clone)]
        assert maps[0] != maps[1]

    def test_preallocated_blocks_that_are_written_later(self, rig: TrackedRig) -> None:
        rig.volume.write_bytes(b"")
        os.truncate(rig.volume, SIZE)
        fallocate(rig.volume, KEEP_SIZE, 0, SIZE)
        rig.next()
        write_at(rig.volume, 2 * CHUNK, b"written")
        next_is_tracked(rig)

    def test_data_that_became_preallocated_zeros(self, rig: TrackedRig) -> None:
        rig.next()
        fallocate(rig.volume, ZERO_RANGE | KEEP_SIZE, CHUNK, 5 * CHUNK)
        next_is_tracked(rig)

    def test_data_that_became_a_hole(self, rig: TrackedRig) -> None:
        rig.next()
        fallocate(rig.volume, PUNCH_HOLE | KEEP_SIZE, CHUNK, 5 * CHUNK)
        next_is_tracked(rig)

    def test_shrunk_and_grown_back(self, rig: TrackedRig) -> None:
        rig.next()
        os.truncate(rig.volume, SIZE // 2 + 77)
        os.truncate(rig.volume, SIZE)
        next_is_tracked(rig)

    def test_blocks_of_the_same_file_in_other_places(self, rig: TrackedRig) -> None:
        rig.next()
        clone_range(rig.volume, 0, CHUNK, rig.volume, 9 * CHUNK)
        next_is_tracked(rig)

    def test_the_same_content_in_other_blocks(self, rig: TrackedRig) -> None:
        rig.next()
        write_at(rig.volume, 0, rig.volume.read_bytes())
        next_is_tracked(rig)

    def test_a_last_block_that_is_not_whole(self, rig: TrackedRig) -> None:
        rig.volume.write_bytes(random_bytes(SIZE + 777))
        rig.next()
        write_at(rig.volume, SIZE + 770, b"changed")
        next_is_tracked(rig)

    def test_many_rounds_of_overwriting_the_same_block(self, rig: TrackedRig) -> None:
        """Each baseline keeps its blocks from being reused, until the next one stands."""
        for number in range(12):
            write_at(rig.volume, 4 * CHUNK, random_bytes(CHUNK, seed=number))
            os.sync()
            made = rig.next()
            assert number == 0 or found_by(made) == "reflink"
            assert rig.restored() == rig.volume.read_bytes()


class TestBtrfs:
    def test_compressed_extents_say_nothing(self, btrfs_rig: TrackedRig) -> None:
        """A piece of a compressed extent has the place of all of it."""
        rig = btrfs_rig
        rig.volume.unlink()
        rig.volume.touch()
        run("btrfs", "property", "set", rig.volume, "compression", "zstd")
        text = b"".join(b"%07d." % number for number in range(SIZE // 8))
        rig.volume.write_bytes(text)
        os.sync()
        rig.next()
        with rig.volume.open("rb") as file:
            assert any(not extent.sure for extent in extent_map(file.fileno(), SIZE))
        clone_range(rig.volume, CHUNK, 4096, rig.volume, 0)
        assert rig.volume.read_bytes() != text
        next_is_tracked(rig)

    def test_inline_files_have_no_place(self, btrfs_rig: TrackedRig) -> None:
        rig = btrfs_rig
        rig.volume.write_bytes(random_bytes(1000))
        os.sync()
        rig.next()
        write_at(rig.volume, 10, b"changed")
        next_is_tracked(rig)

    def test_files_that_are_not_copied_on_write(self, btrfs_rig: TrackedRig) -> None:
        rig = btrfs_rig
        rig.volume.unlink()
        rig.volume.touch()
        run("chattr", "+C", rig.volume)
        rig.volume.write_bytes(random_bytes(SIZE))
        rig.next()
        for number in range(3):
            write_at(rig.volume, 5 * CHUNK, random_bytes(CHUNK, seed=number))
            next_is_tracked(rig)

    def test_defragmented(self, btrfs_rig: TrackedRig) -> None:
        rig = btrfs_rig
        rig.next()
        for number in range(20):
            write_at(rig.volume, number * CHUNK, b"changed")
            os.sync()
        run("btrfs", "filesystem", "defragment", "-f", rig.volume)
        next_is_tracked(rig)

    def test_balanced(self, btrfs_rig: TrackedRig) -> None:
        rig = btrfs_rig
        rig.next()
        write_at(rig.volume, 3 * CHUNK, b"changed")
        run("btrfs", "balance", "start", "--full-balance", rig.pool)
        next_is_tracked(rig)


class TestNoBaseline:
    def test_the_first_time(self, rig: TrackedRig) -> None:
        made = rig.next()
        assert found_by(made) == "scan"
        assert os.path.dirname(rig.row().file) == str(rig.pool / SNAPSHOTS)

    def test_it_was_deleted(self, rig: TrackedRig) -> None:
        """On XFS the overwriting is in place then: the same block with other content."""
        rig.next()
        os.unlink(rig.row().file)
        os.sync()
        write_at(rig.volume, 3 * CHUNK, b"changed")
        next_is_scanned(rig, "the baseline is gone")
        next_is_tracked(rig)

    def test_another_file_has_its_name(self, rig: TrackedRig) -> None:
        rig.next()
        write_at(rig.volume, 3 * CHUNK, b"changed")
        os.unlink(rig.row().file)
        run("cp", "--reflink=always", rig.volume, rig.row().file)
        next_is_scanned(rig, "the baseline was changed")

    def test_somebody_wrote_to_it(self, rig: TrackedRig) -> None:
        rig.next()
        write_at(rig.volume, 3 * CHUNK, b"changed")
        clone_range(rig.volume, 0, SIZE, Path(rig.row().file), 0)
        next_is_scanned(rig, "the baseline was changed")

    def test_its_blocks_move_while_it_is_compared(
        self, rig: TrackedRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rig.next()
        write_at(rig.volume, 3 * CHUNK, b"changed")
        maps: list[list[Extent]] = []

        def moving(fd: int, size_bytes: int) -> list[Extent]:
            maps.append(extent_map(fd, size_bytes))
            if len(maps) == 1:
                path = Path(rig.row().file)
                write_at(path, 0, path.read_bytes())
                os.sync()
            return maps[-1]

        monkeypatch.setattr(tracking, "extent_map", moving)
        next_is_scanned(rig, "the baseline can't be compared: its blocks moved")

    def test_overwriting_the_volume_does_not_count_as_moving(
        self, rig: TrackedRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It ends sharing, which cuts the baseline's extents anew on XFS."""
        rig.next()
        write_at(rig.volume, 3 * CHUNK, b"changed")

        def while_it_is_written(fd: int, size_bytes: int) -> list[Extent]:
            found = extent_map(fd, size_bytes)
            write_at(rig.volume, 20 * CHUNK, random_bytes(CHUNK))
            os.sync()
            return found

        monkeypatch.setattr(tracking, "extent_map", while_it_is_written)
        made = rig.next()
        assert found_by(made) == "reflink", notes(made)
        assert rig.restored() == Path(rig.row().file).read_bytes()

    def test_the_volume_was_replaced(self, rig: TrackedRig) -> None:
        rig.next()
        fresh = rig.pool / "fresh"
        shutil.copyfile(rig.volume, fresh)
        write_at(fresh, 3 * CHUNK, b"changed")
        os.rename(fresh, rig.volume)
        next_is_scanned(rig, "the volume was replaced")

    def test_a_new_volume_that_got_its_inode(self, xfs_rig: TrackedRig) -> None:
        """Only the generation tells the two apart."""
        rig = xfs_rig
        rig.next()
        before = rig.volume.stat().st_ino
        rig.volume.unlink()
        for number in range(500):
            rig.volume.touch()
            if rig.volume.stat().st_ino == before:
                break
            rig.volume.rename(rig.pool / f"spare-{number}")
        else:
            pytest.fail("XFS does not give the inode away again")
        rig.volume.write_bytes(random_bytes(SIZE, seed=1))
        next_is_scanned(rig, "the volume was replaced")

    def test_a_clone_on_another_file_system(self, rig: TrackedRig, loop_fs: LoopFs) -> None:
        """Numbers of blocks of two file systems say nothing side by side."""
        made = rig.next()
        place = loop_fs("xfs", FS_BYTES) / "v"
        shutil.copyfile(rig.volume, place)
        assert compared(rig, made, place) == (
            "the baseline can't be compared: it is on another file system"
        )

    def test_a_clone_of_another_size(self, rig: TrackedRig) -> None:
        made = rig.next()
        place = rig.pool / "larger"
        run("cp", "--reflink=always", rig.volume, place)
        assert compared(rig, made, place) == ""
        os.truncate(place, SIZE + CHUNK)
        assert compared(rig, made, place) == "its size changed"

    @pytest.mark.parametrize(
        "mark",
        ["file_inode", "file_generation", "file_mtime_ns", "file_ctime_ns", "size_bytes"],
    )
    def test_each_mark_of_its_file_counts_alone(self, rig: TrackedRig, mark: str) -> None:
        rig.next()
        os.close(open_baseline(rig.row()))
        other = msgspec.structs.replace(rig.row(), **{mark: getattr(rig.row(), mark) + 1})
        with pytest.raises(FileExistsError):
            open_baseline(other)

    def test_so_does_its_file_system(self, rig: TrackedRig) -> None:
        rig.next()
        with pytest.raises(FileExistsError):
            open_baseline(msgspec.structs.replace(rig.row(), file_system="another"))

    @pytest.mark.parametrize("size_bytes", [SIZE + CHUNK, SIZE - CHUNK, SIZE - 1])
    def test_grown_or_shrunk(self, rig: TrackedRig, size_bytes: int) -> None:
        rig.next()
        os.truncate(rig.volume, size_bytes)
        made = rig.next()
        assert "vda full: its size changed" in notes(made)
        assert rig.restored() == rig.volume.read_bytes()

    def test_it_is_of_another_backup(
        self, rig: TrackedRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As after a kill between a commit and the keeping of its clone."""
        rig.next()
        write_at(rig.volume, 3 * CHUNK, b"changed")
        with monkeypatch.context() as patch:
            patch.setattr(Baselines, "keep", lambda *_: None)
            rig.next()
        write_at(rig.volume, 3 * CHUNK, random_bytes(CHUNK))
        next_is_scanned(rig, "the baseline is not the parent backup's")

    def test_too_many_extents(self, rig: TrackedRig, monkeypatch: pytest.MonkeyPatch) -> None:
        rig.next()
        monkeypatch.setattr(tracking, "MOST_EXTENTS", 0)
        next_is_scanned(rig, "the baseline can't be compared: too many extents")


class TestKeeping:
    def test_one_at_most(self, rig: TrackedRig) -> None:
        for _ in range(3):
            rig.next()
        assert os.listdir(rig.pool / SNAPSHOTS) == [os.path.basename(rig.row().file)]

    def test_none_without_room(self, rig: TrackedRig) -> None:
        rig.next()
        greedy = Baselines(rig.state, lambda: 1.0, reserve_share=1.0)
        rig.tracker_of = lambda backup: tracking.Tracker(greedy, rig.row().vm_uuid, backup)
        next_is_tracked(rig)
        assert not (rig.pool / SNAPSHOTS).exists()
        next_is_scanned(rig, "no baseline was kept: the pool is short of room")

    def test_none_without_its_row(self, rig: TrackedRig, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(_row: object) -> None:
            raise PointFull("no room for the state")

        monkeypatch.setattr(rig.state.baselines, "put", full)
        rig.next()
        assert not (rig.pool / SNAPSHOTS).exists()

    def test_leftovers_are_cleared_and_baselines_are_not(self, rig: TrackedRig) -> None:
        rig.next()
        leftover = rig.pool / SNAPSHOTS / "baseline-of-nobody"
        leftover.touch()
        assert clear_leftovers(str(rig.pool), rig.baselines.files()) == 1
        assert not leftover.exists()
        next_is_tracked(rig)

    def test_drop_and_forget(self, rig: TrackedRig) -> None:
        rig.next()
        rig.baselines.drop(rig.row(), "for a reason")
        assert not (rig.pool / SNAPSHOTS).exists()
        next_is_scanned(rig, "for a reason")
        rig.baselines.forget(rig.row())
        assert not (rig.pool / SNAPSHOTS).exists()
        assert rig.baselines.rows() == []
        next_is_scanned(rig, "no baseline yet")


def test_files_for_whose_removal_there_was_no_thread_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As leftovers; and they keep no others of their directory."""
    names = [tmp_path / name for name in "abc"]
    for path in names:
        path.touch()

    def no_more(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    removal = _Removal()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        removal.remove(str(names[0]))
    removal.remove(*map(str, names[1:]))
    assert list(tmp_path.iterdir()) == names[:1]


def test_a_direct_read_keeps_none(tmp_path: Path) -> None:
    with TrackedRig(tmp_path, tmp_path / "pool") as rig:
        rig.volume.write_bytes(random_bytes(SIZE))
        made = rig.next()
        assert made.result is not None
        if made.result.facts.snapshot.method == "direct":
            assert rig.baselines.rows() == []
        rig.state.close()


def test_one_miss_turns_tracking_off_for_good(
    rig: TrackedRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.backup.sampling.FEWEST_CHUNKS", 1000)
    rig.next()
    write_at(rig.volume, 3 * CHUNK, b"changed")
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "differences", lambda *_: [])
        next_is_scanned(rig, "reflink missed a change in chunk 3, as a sample showed")
    assert rig.row().off
    assert not (rig.pool / SNAPSHOTS).exists()
    again = Baselines(rig.state, lambda: 1.0)  # as after a restart
    rig.tracker_of = lambda backup: tracking.Tracker(again, rig.row().vm_uuid, backup)
    for _ in range(2):
        next_is_scanned(rig, "tracking is off since backup")
    again.turn_on(rig.row().vm_uuid, "vda")
    next_is_scanned(rig, "tracking is off")
    next_is_tracked(rig)
