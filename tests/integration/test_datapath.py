"""Backups and restores of real files through the real storage: what was there comes back."""

from __future__ import annotations

import contextlib
import ctypes
import filecmp
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.backup.backup import run_backup
from engine.errors import Conflict
from engine.jobs.jobs import JobContext
from engine.snapshot.freeze import FreezeHook
from storage.domain.session import NewBackup, Session
from storage.errors import ChunkMissing, NotOnPoint
from tests.conftest import LoopFs
from tests.rig import Made, Rig, allocated_bytes, random_bytes, sparse, write_at

CHUNK = 64 << 10
MIB = 1 << 20
TIB = 1 << 40
_PUNCH = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path, chunk_size=CHUNK) as made:
        yield made


def punch(path: Path, offset: int, size_bytes: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        done = _libc.fallocate(fd, _PUNCH, ctypes.c_int64(offset), ctypes.c_int64(size_bytes))
        if done != 0:
            raise OSError(ctypes.get_errno(), "fallocate")
    finally:
        os.close(fd)


def same(one: Path, other: Path) -> bool:
    return filecmp.cmp(one, other, shallow=False)


def test_a_chain_of_changes(rig: Rig) -> None:
    path = rig.pool / "v"
    path.write_bytes(random_bytes(40 * MIB + 513))
    copies: list[tuple[Made, Path]] = []

    def keep(parent: Made | None) -> Made:
        made = rig.back_up(path, parent=parent)
        copy = rig.pool / f"copy-{len(copies)}"
        shutil.copyfile(path, copy)
        copies.append((made, copy))
        return made

    made = keep(None)
    write_at(path, 3 * MIB + 77, random_bytes(MIB, 1))
    write_at(path, 40 * MIB + 500, b"at the end")
    made = keep(made)
    write_at(path, 10 * MIB, bytes(5 * MIB))
    punch(path, 20 * MIB + 100, 6 * MIB)
    made = keep(made)
    write_at(path, 12 * MIB, random_bytes(CHUNK, 2))
    made = keep(made)
    os.truncate(path, 50 * MIB + 1)
    made = keep(made)
    os.truncate(path, 15 * MIB + 3)
    made = keep(made)
    write_at(path, 5, b"x")
    keep(made)
    assert [one.result and one.result.facts.full for one, _ in copies] == [
        True,
        False,
        False,
        False,
        True,  # grown
        True,  # shrunk
        False,
    ]
    for made, copy in copies:
        assert same(rig.restore(made), copy)
    # The same after the middle of the chain is gone and what it left was reclaimed.
    rig.domain.forget([copies[1][0].backup, copies[4][0].backup])
    rig.domain.reclaim()
    for number in (0, 2, 3, 5, 6):
        made, copy = copies[number]
        assert same(rig.restore(made), copy)


def test_a_changed_size_makes_only_that_disk_full(rig: Rig) -> None:
    paths = [rig.pool / "v", rig.pool / "w"]
    for number, path in enumerate(paths):
        path.write_bytes(random_bytes(MIB, number))
    first = rig.back_up(*paths)
    os.truncate(paths[1], 2 * MIB)
    second = rig.back_up(*paths, parent=first)
    assert second.result is not None
    assert second.result.facts.incremental == {"vda"}
    assert second.result.facts.notes == ("vdb full: its size changed",)
    assert second.result.parent == first.backup
    for target, path in zip(("vda", "vdb"), paths, strict=True):
        assert same(rig.restore(second, target), path)


def test_a_parent_that_was_deleted_makes_a_full_backup(rig: Rig) -> None:
    path = rig.pool / "v"
    path.write_bytes(random_bytes(MIB))
    first = rig.back_up(path)
    rig.domain.forget([first.backup])
    second = rig.back_up(path, parent=first)
    assert second.result is not None
    assert second.result.facts.full
    assert second.result.parent == ""
    assert second.result.facts.notes == ("full: the parent backup was deleted",)
    assert same(rig.restore(second), path)


def test_ten_sparse_tib_in_seconds(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        path = sparse(rig.pool / "v", 10 * TIB + 513)
        for place in (0, 3 * TIB, 10 * TIB + 500):
            write_at(path, place, b"here")
        started_s = time.process_time()
        first = rig.back_up(path)
        write_at(path, 7 * TIB, b"there")
        punch(path, 3 * TIB, MIB)
        second = rig.back_up(path, parent=first)
        restored = rig.restore(second)
        # Processor time, so that a busy machine does not matter: reading it all takes an hour.
        assert time.process_time() - started_s < 10
        assert second.context.progress().bytes_read < 8 * MIB
        assert second.context.progress().bytes_scanned == 10 * TIB + 513
        assert restored.stat().st_size == 10 * TIB + 513
        assert allocated_bytes(restored) < 4 * MIB
        with path.open("rb") as one, restored.open("rb") as other:
            for place in (0, 3 * TIB, 7 * TIB, 10 * TIB + 500):
                one.seek(place)
                other.seek(place)
                assert one.read(MIB) == other.read(MIB)


class WritesOnce(JobContext):
    """Somebody writes to the volume when the first batch is done."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._once = threading.Lock()

    def add(self, **counts: int) -> None:
        super().add(**counts)
        if self._once.acquire(blocking=False):
            write_at(self._path, 0, b"a guest's write")


@pytest.mark.parametrize("size_bytes", [CHUNK, 30 * MIB], ids=["at the end", "in the middle"])
def test_a_volume_that_changes_fails_the_backup(rig: Rig, size_bytes: int) -> None:
    path = rig.pool / "v"
    path.write_bytes(random_bytes(size_bytes))
    work, _ = rig.plan(path)
    with pytest.raises(Conflict) as caught:
        run_backup(work, WritesOnce(path))
    assert caught.value.code == "volume_changed"
    assert rig.domain.backups() == []
    rig.domain.reclaim()
    assert list(rig.point_path.rglob("packs/*/*")) == []


def test_the_parent_is_held_while_it_is_built_on(rig: Rig) -> None:
    """Forget and gc in the middle of an incremental backup."""

    class Deletes(JobContext):
        def check(self) -> None:
            super().check()
            with contextlib.suppress(NotOnPoint):
                rig.domain.forget([first.backup])
                rig.domain.reclaim()

    path = rig.pool / "v"
    path.write_bytes(random_bytes(30 * MIB))
    first = rig.back_up(path)
    write_at(path, 20 * MIB, b"changed")
    work, second = rig.plan(path, parent=first)
    second.result = run_backup(work, Deletes())
    assert not second.result.facts.full
    rig.domain.reclaim()
    assert same(rig.restore(second), path)
    assert [row.backup for row in rig.domain.backups()] == [second.backup]


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_running_vm_is_backed_up_as_of_its_freeze(
    loop_fs: LoopFs, tmp_path: Path, kind: str
) -> None:
    """Two disks that a writer always changes together are equal in the backup."""
    pool = loop_fs(kind, 400 * MIB)
    frozen = tmp_path / "frozen"
    hook = tmp_path / "hook"
    # Both wait until the writer has seen it, as a guest's file system does: what it says of one
    # freeze must not come late and be taken for what it says of the next.
    hook.write_text(
        f'#!/bin/sh\nif [ "$1" = freeze ]; then touch {frozen}; '
        f"while [ ! -e {frozen}.seen ]; do sleep 0.01; done; "
        f"else rm -f {frozen}; while [ -e {frozen}.seen ]; do sleep 0.01; done; fi\n"
    )
    hook.chmod(0o755)
    one, other = pool / "v", pool / "w"
    for path in (one, other):
        path.write_bytes(bytes(MIB))
    stop = threading.Event()

    def guest() -> None:
        number = 0
        while not stop.is_set():
            if frozen.exists():
                frozen.with_suffix(".seen").touch()
                while frozen.exists():
                    time.sleep(0.001)
                frozen.with_suffix(".seen").unlink()
            number += 1
            for path in (one, other):
                write_at(path, (number % 16) * CHUNK, number.to_bytes(8, "big") * 512)

    writer = threading.Thread(target=guest)
    writer.start()
    try:
        with Rig(tmp_path, pool, CHUNK) as rig:
            made = None
            for _ in range(3):
                work, new = rig.plan(
                    one, other, parent=made, freeze=FreezeHook([str(hook)], "uuid")
                )
                new.result = run_backup(work, new.context)
                new.capacities = {"vda": MIB, "vdb": MIB}
                made = new
                assert new.result.facts.snapshot.frozen
                assert new.result.facts.snapshot.method == "reflink"
                assert same(rig.restore(new, "vda"), rig.restore(new, "vdb"))
    finally:
        stop.set()
        writer.join()
    assert sorted(name for name in os.listdir(pool) if name.startswith(".")) == []


def test_a_chunk_deleted_under_the_backup_is_stored_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between known() and the commit somebody deletes the only backup that had the chunks."""
    content = random_bytes(3 * MIB + 5)
    old, new = rig.pool / "old", rig.pool / "new"
    old.write_bytes(content)
    first = rig.back_up(old)
    new.write_bytes(random_bytes(MIB, 1) + content)
    commit, tries = Session.commit, list[int]()

    def commit_after_delete(session: Session, backups: list[NewBackup]) -> None:
        if not tries:
            rig.domain.forget([first.backup])
            rig.domain.reclaim()
        tries.append(len(tries))
        commit(session, backups)

    monkeypatch.setattr(Session, "commit", commit_after_delete)
    second = rig.back_up(new)
    assert len(tries) == 2
    monkeypatch.undo()
    assert same(rig.restore(second), new)
    rig.domain.reclaim()
    assert same(rig.restore(second), new)


def test_chunks_that_stay_missing_are_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rig.pool / "v"
    path.write_bytes(random_bytes(MIB))
    tries: list[int] = []

    def commit(_session: Session, _backups: list[NewBackup]) -> None:
        tries.append(len(tries))
        raise ChunkMissing(frozenset({bytes(31) + b"x"}))

    monkeypatch.setattr(Session, "commit", commit)
    with pytest.raises(ChunkMissing):
        rig.back_up(path)
    assert len(tries) == 4
    assert rig.domain.backups() == []


SIZE = 40 * CHUNK
place = st.integers(0, SIZE - 1)
length = st.integers(1, 6 * CHUNK)
change = st.one_of(
    st.tuples(st.just("write"), place, length, st.integers(0, 3)),
    st.tuples(st.just("zeros"), place, length, st.just(0)),
    st.tuples(st.just("punch"), place, length, st.just(0)),
    st.tuples(st.just("copy"), place, length, st.integers(0, 39)),
    st.tuples(st.just("resize"), st.integers(0, SIZE + 3 * CHUNK), st.just(0), st.just(0)),
)


def apply_change(path: Path, what: str, offset: int, size_bytes: int, seed: int) -> None:
    end = path.stat().st_size
    size_bytes = min(size_bytes, end - offset)
    if what == "resize":
        os.truncate(path, offset)
    elif size_bytes <= 0:
        return
    elif what == "write":
        write_at(path, offset, random_bytes(size_bytes, seed))
    elif what == "zeros":
        write_at(path, offset, bytes(size_bytes))
    elif what == "punch":
        punch(path, offset, size_bytes)
    else:  # a chunk that is elsewhere on the disk, at a chunk's place
        at = seed * CHUNK
        chunk = path.read_bytes()[at : at + CHUNK]
        write_at(path, min(offset, end - len(chunk)) // CHUNK * CHUNK, chunk)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(st.lists(change, max_size=5), st.booleans(), st.booleans()),
        min_size=1,
        max_size=6,
    )
)
def test_any_history_restores_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    rounds: list[tuple[list[tuple[str, int, int, int]], bool, bool]],
) -> None:
    """Each round: some changes, then a backup, full or on the last one; now and then a delete."""
    with Rig(tmp_path_factory.mktemp("history"), chunk_size=CHUNK) as rig:
        path = sparse(rig.pool / "v", SIZE)
        history: list[tuple[Made, bytes]] = []
        for changes, full, forget in rounds:
            for one in changes:
                apply_change(path, *one)
            parent = history[-1][0] if history and not full else None
            made = rig.back_up(path, parent=parent)
            history.append((made, path.read_bytes()))
            if forget and len(history) > 1:
                old, _ = history.pop(len(history) // 2 - 1)
                rig.domain.forget([old.backup])
                rig.domain.reclaim()
        for made, expected in history:
            assert rig.restore(made).read_bytes() == expected


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_size(tmp_path: Path) -> None:
    """A disk of many pages, in a process of its own: the peak stays where a small disk's is."""
    peaks = [_peak_of(tmp_path / str(pages), pages) for pages in (2, 24)]
    assert peaks[1] < peaks[0] + 24 * MIB


_BACK_UP_AND_RESTORE = """
import os, resource, sys
from pathlib import Path
from tests.rig import Rig, sparse
root, pages, chunk_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with Rig(root, chunk_size=chunk_size) as rig:
    path = sparse(rig.pool / "v", pages * 1024 * chunk_size)
    with path.open("r+b", buffering=0) as file:
        for chunk in range(pages * 1024):
            os.pwrite(file.fileno(), chunk.to_bytes(4, "big") * 8, chunk * chunk_size)
    rig.restore(rig.back_up(path))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _peak_of(root: Path, pages: int) -> int:
    """Peak memory of a process that backs up and restores `pages` pages of different chunks."""
    root.mkdir()
    argv = [sys.executable, "-c", _BACK_UP_AND_RESTORE, str(root), str(pages), str(CHUNK)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=True)
    return int(done.stdout) * 1024
