"""Changed ranges in the data path: what is read, what is tried, and what a wrong claim leads to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.backup.sampling import FEWEST_CHUNKS, Sample, try_unchanged
from engine.jobs.jobs import JobContext
from engine.snapshot.sources import VolumeSource, open_volume
from storage.format.manifests import PAGE_ENTRIES
from tests.rig import Made, Rig, counts, found_by, random_bytes, sparse, write_at

CHUNK = 64 << 10
NOTHING: list[tuple[int, int]] = []


def volume(rig: Rig, chunks: int) -> Path:
    path = rig.pool / "v"
    path.write_bytes(random_bytes(chunks * CHUNK))
    return path


def claim(monkeypatch: pytest.MonkeyPatch, changed: list[tuple[int, int]] | None) -> None:
    """All volumes say from now on that this is what changed."""
    monkeypatch.setattr(VolumeSource, "found_by", "bitmap")
    monkeypatch.setattr(
        VolumeSource, "changed_ranges", lambda _: None if changed is None else iter(changed)
    )


def test_only_what_may_have_changed_is_read(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    path = volume(rig, 100)
    first = rig.back_up(path)
    write_at(path, 7 * CHUNK + 5, b"changed")
    write_at(path, 50 * CHUNK, bytes(2 * CHUNK))
    claim(monkeypatch, [(7 * CHUNK + 5, 7), (50 * CHUNK - 1, 2 * CHUNK + 2)])
    second = rig.back_up(path, parent=first)
    assert counts(second) == (100 * CHUNK, (5 + FEWEST_CHUNKS) * CHUNK, 3 * CHUNK)
    assert found_by(second) == "bitmap"
    assert rig.restore(second).read_bytes() == path.read_bytes()


def test_nothing_changed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    path = volume(rig, 100)
    first = rig.back_up(path)
    claim(monkeypatch, [])
    second = rig.back_up(path, parent=first)
    assert counts(second) == (100 * CHUNK, (FEWEST_CHUNKS + 1) * CHUNK, 0)  # and 1 in 100
    assert rig.restore(second).read_bytes() == path.read_bytes()


def test_changed_holes_become_zero_marks_unread(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sparse(rig.pool / "v", 3 * PAGE_ENTRIES * CHUNK)
    write_at(path, PAGE_ENTRIES * CHUNK, random_bytes(64 * CHUNK))
    first = rig.back_up(path)
    sparse(path, 3 * PAGE_ENTRIES * CHUNK)
    claim(monkeypatch, [(0, 3 * PAGE_ENTRIES * CHUNK)])
    second = rig.back_up(path, parent=first)
    assert counts(second) == (3 * PAGE_ENTRIES * CHUNK, 0, 0)
    assert not any(rig.restore(second).read_bytes())


def test_a_full_backup_asks_no_tracker(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(monkeypatch, [])
    path = volume(rig, 3)
    made = rig.back_up(path)
    assert found_by(made) == "scan"
    assert rig.restore(made).read_bytes() == path.read_bytes()


def test_after_a_resize_no_tracker_counts(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    path = volume(rig, 10)
    first = rig.back_up(path)
    write_at(path, 10 * CHUNK, b"grown")
    claim(monkeypatch, [])
    second = rig.back_up(path, parent=first)
    assert found_by(second) == "scan"
    assert rig.restore(second).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("how", ["rewritten", "punched"])
def test_a_wrong_claim_is_found_and_all_is_scanned(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = volume(rig, 100)
    first = rig.back_up(path)
    if how == "rewritten":
        path.write_bytes(random_bytes(100 * CHUNK, seed=1))
    else:
        sparse(path, 100 * CHUNK)
    claim(monkeypatch, [])
    second = rig.back_up(path, parent=first)
    assert found_by(second) == "scan"
    assert second.result is not None
    assert any("missed a change" in note for note in second.result.facts.notes)
    assert rig.restore(second).read_bytes() == path.read_bytes()


def attempt(
    rig: Rig, path: Path, parent: Made, share: float, changed: list[tuple[int, int]] = NOTHING
) -> tuple[Sample, JobContext]:
    source = VolumeSource(open_volume(str(path)), str(path))
    context = JobContext()
    parent_map = rig.domain.disk_map(parent.disks["vda"])
    sample = try_unchanged(rig.domain, source, parent_map, changed, context, 3, share=share)
    source.close()
    return sample, context


def test_the_share_is_what_is_read(rig: Rig) -> None:
    path = volume(rig, 200)
    first = rig.back_up(path)
    sample, context = attempt(rig, path, first, 0.25, [(0, 100 * CHUNK)])
    assert sample == Sample(25 + FEWEST_CHUNKS)
    assert context.progress().bytes_read == sample.chunks * CHUNK


def test_what_may_have_changed_is_not_tried(rig: Rig) -> None:
    path = volume(rig, 20)
    first = rig.back_up(path)
    write_at(path, 3 * CHUNK, random_bytes(5 * CHUNK))
    assert not attempt(rig, path, first, 1.0)[0].sound
    assert attempt(rig, path, first, 1.0, [(3 * CHUNK, 5 * CHUNK)])[0] == Sample(15)


@pytest.mark.parametrize("chunk", [0, 1, PAGE_ENTRIES + 1])
def test_with_all_chunks_tried_any_miss_is_found(rig: Rig, chunk: int) -> None:
    path = sparse(rig.pool / "v", 2 * PAGE_ENTRIES * CHUNK)
    for page_no in range(2):
        write_at(path, page_no * PAGE_ENTRIES * CHUNK, random_bytes(CHUNK))
    first = rig.back_up(path)
    assert attempt(rig, path, first, 1.0)[0].sound
    write_at(path, chunk * CHUNK, b"missed")  # over data, and where there was a hole
    assert attempt(rig, path, first, 1.0)[0].wrong_chunk == chunk


@pytest.mark.parametrize("written_since", [False, True])
def test_a_chunk_that_was_cut_through_is_found(rig: Rig, written_since: bool) -> None:
    """A disk that was made smaller and as large again, by a tracker that doesn't say so."""
    path = volume(rig, 3 * PAGE_ENTRIES)
    first = rig.back_up(path)
    cut = 2 * PAGE_ENTRIES
    os.truncate(path, cut * CHUNK - 1)
    os.truncate(path, 3 * PAGE_ENTRIES * CHUNK)
    changed = [(cut * CHUNK, PAGE_ENTRIES * CHUNK)]  # else it is found by the holes
    if written_since:
        write_at(path, 2500 * CHUNK, random_bytes(7 * CHUNK))
    sample, _ = attempt(rig, path, first, 0.0, changed)
    assert sample.wrong_chunk == cut - 1
