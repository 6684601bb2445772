"""A first backup of a disk like one that is on the point: what differs is stored, and is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.backup.backup import run_backup
from engine.backup.likeness import find_lender
from engine.jobs.jobs import JobContext
from engine.snapshot.sources import VolumeSource, open_volume
from storage.check.check import check_point
from tests.engine_rig import ANYWHERE, EngineRig
from tests.rig import Made, Rig, random_bytes, write_at

CHUNK = 64 << 10
BLOCK = 4096
MIB = 1 << 20


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path, chunk_size=CHUNK) as made:
        yield made


def back_up_like(
    rig: Rig, path: Path, *lenders: str, before_commit: Callable[[], object] = lambda: None
) -> Made:
    work, made = rig.plan(path)

    def label(_: object) -> bytes:
        before_commit()
        return b"label"

    disks = [replace(disk, lenders=lenders) for disk in work.disks]
    made.result = run_backup(replace(work, disks=disks, make_label=label), made.context)
    return made


@pytest.fixture
def template(rig: Rig) -> Made:
    (rig.pool / "template").write_bytes(random_bytes(40 * CHUNK))
    return rig.back_up(rig.pool / "template")


@pytest.fixture
def clone(rig: Rig, template: Made) -> Path:
    """Larger, with a block changed in each of four chunks, and two chunks of its own."""
    assert template.backup
    path = rig.pool / "clone"
    path.write_bytes((rig.pool / "template").read_bytes() + bytes(8 * CHUNK))
    for at in range(4):
        write_at(path, at * CHUNK + 5 * BLOCK, random_bytes(BLOCK, 10 + at))
    write_at(path, 45 * CHUNK, random_bytes(2 * CHUNK, 20))
    return path


def stored(made: Made) -> int:
    return made.context.progress().bytes_stored


def test_what_differs_from_the_template_is_stored(rig: Rig, template: Made, clone: Path) -> None:
    made = back_up_like(rig, clone, "no such disk", template.disks["vda"])
    changed = 4 * BLOCK + 2 * CHUNK
    assert changed < stored(made) < changed + 6 * 200
    assert made.result is not None
    assert made.result.parent == ""
    assert made.result.facts.full
    assert any("like another disk" in note for note in made.result.facts.notes)
    assert rig.restore(made).read_bytes() == clone.read_bytes()


def test_it_outlives_the_template(rig: Rig, template: Made, clone: Path) -> None:
    made = back_up_like(rig, clone, template.disks["vda"])
    rig.domain.forget([template.backup])
    rig.domain.reclaim(sparse_below=1.0)
    assert rig.restore(made).read_bytes() == clone.read_bytes()
    rig.domain.rebuild()
    assert rig.restore(made).read_bytes() == clone.read_bytes()
    assert not check_point(str(rig.point_path), deep=True).findings


def test_a_template_deleted_before_the_commit_costs_whole_chunks(
    rig: Rig, template: Made, clone: Path
) -> None:
    def delete() -> None:
        rig.domain.forget([template.backup])
        rig.domain.reclaim(sparse_below=1.0)

    made = back_up_like(rig, clone, template.disks["vda"], before_commit=delete)
    assert rig.restore(made).read_bytes() == clone.read_bytes()
    assert not check_point(str(rig.point_path), deep=True).findings


def test_the_likest_lends_and_none_that_is_not_like(rig: Rig, template: Made, clone: Path) -> None:
    other = rig.pool / "other"
    other.write_bytes(random_bytes(40 * CHUNK, 2))
    unlike = rig.back_up(other).disks["vda"]
    source = VolumeSource(open_volume(str(clone)), str(clone))
    try:
        assert find_lender(rig.domain, source, [unlike], JobContext()) is None
        assert find_lender(rig.domain, source, [], JobContext()) is None
        found = find_lender(rig.domain, source, [unlike, template.disks["vda"]], JobContext())
    finally:
        source.close()
    assert found is not None
    assert found.page(0) == rig.domain.disk_map(template.disks["vda"]).page(0)


def test_vms_of_one_template(tmp_path: Path) -> None:
    """As the engine chooses: another VM's disk; and the VM's own, once it has grown."""
    with EngineRig(tmp_path / "data") as rig:
        content = bytearray(random_bytes(24 * MIB))
        rig.back_up(rig.make_vm("template", bytes(content)))
        content[5 * MIB : 5 * MIB + BLOCK] = random_bytes(BLOCK, 2)
        vm = rig.make_vm("clone", bytes(content))
        backup, job = rig.ask_backup(vm)
        assert BLOCK < rig.succeed(job).progress.bytes_stored < MIB // 2
        assert rig.restore(rig.engine.backup(ANYWHERE, backup), "again") == [bytes(content)]
        content[7 * MIB : 7 * MIB + BLOCK] = random_bytes(BLOCK, 3)
        content += bytes(MIB)
        rig.volume(vm.disks[0]).write_bytes(content)
        backup, job = rig.ask_backup(vm)
        assert BLOCK < rig.succeed(job).progress.bytes_stored < MIB // 2
        row = rig.engine.backup(ANYWHERE, backup)
        assert any("its size changed" in note for note in row.label.notes)
        assert rig.restore(row, "grown") == [bytes(content)]
