"""engine.backup.pipeline: what a scan reads, compares, stores and counts, with the real storage."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from engine.backup.backup import run_backup
from engine.backup.pipeline import ITEM_BYTES, scan_disk, store_again
from engine.errors import Cancelled, PoolUnreachable
from engine.snapshot.sources import DiskSource, VolumeSource, open_volume
from storage.domain.domain import Domain
from storage.format.chunks import ZERO_MARK
from storage.format.manifests import PAGE_ENTRIES
from tests.rig import Made, Rig, counts, random_bytes, sparse, write_at

CHUNK = 64 << 10


def volume(rig: Rig, content: bytes, name: str = "v") -> Path:
    path = rig.pool / name
    path.write_bytes(content)
    return path


def entries(domain: Domain, made: Made) -> dict[int, bytes]:
    """Chunk index → id of the disk vda."""
    return {
        page_no * PAGE_ENTRIES + at: chunk_id
        for page_no, page in domain.disk_map(made.disks["vda"]).pages()
        for at, chunk_id in page.items()
    }


def test_zeros_are_read_but_not_kept(rig: Rig) -> None:
    path = volume(rig, bytes(2 * CHUNK) + random_bytes(CHUNK) + bytes(CHUNK))
    made = rig.back_up(path)
    assert sorted(entries(rig.domain, made)) == [2]
    assert counts(made) == (4 * CHUNK, 4 * CHUNK, CHUNK)


def test_holes_are_not_even_read_but_count_as_scanned(rig: Rig) -> None:
    path = sparse(rig.pool / "v", 5000 * CHUNK)
    write_at(path, 3000 * CHUNK, random_bytes(CHUNK))
    made = rig.back_up(path)
    scanned, read, changed = counts(made)
    assert scanned == 5000 * CHUNK
    assert CHUNK <= read <= 3 * CHUNK
    assert changed == CHUNK


def test_the_last_chunk_has_its_real_length(rig: Rig) -> None:
    path = volume(rig, random_bytes(CHUNK + 1))
    made = rig.back_up(path)
    found = entries(rig.domain, made)
    assert found[1] == rig.domain.hasher.full(random_bytes(CHUNK + 1)[CHUNK:])
    assert counts(made) == (CHUNK + 1, CHUNK + 1, CHUNK + 1)


def test_equal_chunks_are_stored_once(rig: Rig) -> None:
    """Within an item, between items, and between disks."""
    chunk = random_bytes(CHUNK)
    many = 3 * ITEM_BYTES // CHUNK
    made = rig.back_up(volume(rig, chunk * many), volume(rig, chunk * 2, "w"))
    stored = made.context.progress().bytes_stored
    assert CHUNK <= stored < CHUNK + 1000
    assert set(entries(rig.domain, made).values()) == {rig.domain.hasher.full(chunk)}
    assert len(entries(rig.domain, made)) == many


def test_unchanged_chunks_are_not_in_an_incremental(rig: Rig) -> None:
    path = volume(rig, random_bytes(10 * CHUNK))
    first = rig.back_up(path)
    write_at(path, 4 * CHUNK + 5, b"changed")
    second = rig.back_up(path, parent=first)
    assert counts(second) == (10 * CHUNK, 10 * CHUNK, CHUNK)
    assert 4096 <= second.context.progress().bytes_stored < 4096 + 1000
    before, after = entries(rig.domain, first), entries(rig.domain, second)
    assert {at for at in after if after[at] != before[at]} == {4}


def test_a_chunk_that_others_have_is_not_stored_again(rig: Rig) -> None:
    first = rig.back_up(volume(rig, random_bytes(4 * CHUNK)))
    second = rig.back_up(volume(rig, random_bytes(4 * CHUNK), "w"))
    assert second.context.progress().bytes_stored == 0
    assert counts(second) == (4 * CHUNK, 4 * CHUNK, 4 * CHUNK)
    assert entries(rig.domain, second) == entries(rig.domain, first)


class Pages:
    """Stands for a ManifestBuilder and keeps what it is given."""

    def __init__(self) -> None:
        self.pages: list[tuple[int, dict[int, bytes]]] = []

    def add_page(self, page_no: int, page: dict[int, bytes]) -> None:
        self.pages.append((page_no, dict(page)))


def scan(rig: Rig, path: Path, parent: Made | None, workers: int = 3) -> Pages:
    pages = Pages()
    source = VolumeSource(open_volume(str(path)), str(path))
    base = rig.domain.disk_map(parent.disks["vda"]) if parent else None
    with rig.domain.begin("backup", [parent.backup] if parent else []) as session:
        scan_disk(
            rig.domain,
            source,
            session,
            pages,  # type: ignore[arg-type]
            base,
            Made("", [], "").context,
            workers,
        )
    source.close()
    return pages


def test_what_became_a_hole_or_zeros_gets_a_zero_mark(rig: Rig) -> None:
    path = sparse(rig.pool / "v", 4 * PAGE_ENTRIES * CHUNK)
    for page_no in range(4):
        write_at(path, page_no * PAGE_ENTRIES * CHUNK, random_bytes(3 * CHUNK))
    first = rig.back_up(path)
    data = bytearray(random_bytes(3 * CHUNK))
    data[CHUNK : 2 * CHUNK] = bytes(CHUNK)  # zeros written over data
    fresh = sparse(rig.pool / "w", 4 * PAGE_ENTRIES * CHUNK)
    write_at(fresh, PAGE_ENTRIES * CHUNK, bytes(data))  # the other pages are holes now
    write_at(fresh, 3 * PAGE_ENTRIES * CHUNK, random_bytes(3 * CHUNK))  # as it was
    assert scan(rig, fresh, first).pages == [
        (0, {0: ZERO_MARK, 1: ZERO_MARK, 2: ZERO_MARK}),
        (1, {1: ZERO_MARK}),
        (2, {0: ZERO_MARK, 1: ZERO_MARK, 2: ZERO_MARK}),
    ]


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_pages_do_not_depend_on_the_workers(rig: Rig, workers: int) -> None:
    path = volume(rig, random_bytes((2 * PAGE_ENTRIES + 77) * 100), "v")
    pages = scan(rig, path, None, workers).pages
    assert pages == scan(rig, path, None, 1).pages


class Failing:
    """A source that fails, or calls something, at its n-th read."""

    def __init__(self, inner: DiskSource, at_read: int) -> None:
        self._inner = inner
        self._left = at_read
        self._lock = threading.Lock()
        self.capacity = inner.capacity
        self.found_by = inner.found_by
        self.data_ranges = inner.data_ranges
        self.changed_ranges = inner.changed_ranges
        self.prefetch = inner.prefetch
        self.close = inner.close

    def read_into(self, buffer: memoryview, offset: int) -> int:
        with self._lock:
            self._left -= 1
            if self._left < 0:
                raise PoolUnreachable("torn out")
        return self._inner.read_into(buffer, offset)


@pytest.mark.parametrize("at_read", [0, 3])
def test_a_failing_read_ends_all_workers_and_is_raised(rig: Rig, at_read: int) -> None:
    path = volume(rig, random_bytes(6 * ITEM_BYTES))
    source = Failing(VolumeSource(open_volume(str(path)), str(path)), at_read)
    context = Made("", [], "").context
    before = threading.active_count()
    with (
        rig.domain.begin("backup") as session,
        pytest.raises(PoolUnreachable, match="torn out"),
    ):
        scan_disk(
            rig.domain,
            source,
            session,
            Pages(),  # type: ignore[arg-type]
            None,
            context,
            3,
        )
    source.close()
    assert threading.active_count() == before
    assert context.progress().bytes_read <= at_read * ITEM_BYTES


def test_a_cancelled_job_stops_at_a_batch_and_leaves_nothing(rig: Rig) -> None:
    work, made = rig.plan(volume(rig, random_bytes(2 * ITEM_BYTES)))
    made.context.cancel(Cancelled("cancelled", "enough"))
    with pytest.raises(Cancelled):
        run_backup(work, made.context)
    assert made.context.progress().bytes_read == 0
    assert rig.domain.backups() == []
    assert list((rig.point_path / "domains").rglob("packs/*/*")) == []


def test_store_again_stores_what_is_wanted_though_it_is_known(rig: Rig) -> None:
    content = random_bytes(5 * CHUNK + 3)
    path = volume(rig, content)
    rig.back_up(path)
    wanted = [
        rig.domain.hasher.full(content[CHUNK : 2 * CHUNK]),
        rig.domain.hasher.full(content[5 * CHUNK :]),
    ]
    source = VolumeSource(open_volume(str(path)), str(path))
    context = Made("", [], "").context
    with rig.domain.begin("backup") as session:
        store_again(rig.domain, source, session, wanted, context, 2)
    source.close()
    assert CHUNK + 3 <= context.progress().bytes_stored < CHUNK + 1000
