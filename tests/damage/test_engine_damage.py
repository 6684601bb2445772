"""Damage as a user meets it: jobs that name it, restores of what is left, backups that heal."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from engine.model import Backup, Vm
from engine.points.keeper import Keeper
from engine.verb_types import EVERYWHERE, NewDisk
from storage.check.check import Finding
from storage.domain.domain import Domain
from storage.domain.maps import DiskMap
from storage.errors import Damaged, PointUnreachable, StorageError
from storage.files.fs import OsFs
from storage.format.packs import read_footer
from tests.engine_rig import ANYWHERE, EngineRig
from tests.rig import random_bytes

MIB = 1 << 20


def damage_chunks(rig: EngineRig, *contents: bytes) -> Path:
    """Flips a bit in these chunks of the one pack."""
    (pack,) = (rig.data / "point").rglob("packs/*/*")
    (domain,) = rig.core.points.opened(rig.point_uuid).domains.values()
    wanted = [domain.hasher.full(content) for content in contents]
    _, entries = read_footer(OsFs(), str(pack))
    content = bytearray(pack.read_bytes())
    for entry in entries:
        content[entry.offset + 100] ^= 4 * (entry.chunk_id in wanted)
    pack.chmod(0o600)
    pack.write_bytes(content)
    return pack


@pytest.fixture
def hit(tmp_path: Path) -> tuple[EngineRig, Vm, Backup, Path]:
    rig = EngineRig(tmp_path / "data")
    content = random_bytes(4 * MIB, 1)
    vm = rig.make_vm("vm", content, random_bytes(MIB, 2))
    backup = rig.back_up(vm)
    return rig, vm, backup, damage_chunks(rig, content[:MIB], content[MIB : 2 * MIB])


Hit = tuple[EngineRig, Vm, Backup, Path]


def test_a_damaged_backup_is_restored_as_far_as_it_goes_when_asked_to(hit: Hit) -> None:
    rig, vm, backup, pack = hit
    with rig:
        _, job = rig.ask_restore(backup, "not")
        failed = rig.ended(job)
        assert failed.state == "failed"
        assert str(pack) in failed.error
        made, job = rig.ask_restore(backup, "left", allow_damaged=True)
        lines = rig.succeed(job).result
        assert lines[0] == f"sda: {2 * MIB} bytes in 1 ranges are damaged and read as zeros"
        assert lines[1] == f"sda: missing offset=0 length={2 * MIB}"
        disks = rig.engine.vm(made).disks
        whole = rig.volume(vm.disks[0]).read_bytes()
        assert rig.volume(disks[0]).read_bytes() == bytes(2 * MIB) + whole[2 * MIB :]
        assert rig.volume(disks[1]).read_bytes() == rig.volume(vm.disks[1]).read_bytes()


def test_a_disk_whose_map_is_damaged_needs_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its volume would be larger than the pool, so what all of them hold is measured."""
    with EngineRig(tmp_path / "data") as rig:
        huge = rig.pool_path / "huge.raw"
        huge.touch()
        os.truncate(huge, 8 << 40)
        (rig.pool_path / "whole.raw").write_bytes(b"x" * MIB)
        disks = [
            NewDisk("sda", rig.pool_uuid, "huge.raw"),
            NewDisk("sdb", rig.pool_uuid, "whole.raw"),
        ]
        vm = rig.engine.vm(rig.engine.create_vm(ANYWHERE, "vm", "", "", disks))
        backup = rig.back_up(vm)
        disk_map = Domain.disk_map

        def damaged(self: Domain, disk: str) -> DiskMap:
            if disk == backup.label.disks[0].disk_uuid:
                raise Damaged("the manifest")
            return disk_map(self, disk)

        monkeypatch.setattr(Domain, "disk_map", damaged)
        with pytest.raises(Damaged):
            rig.ask_restore(backup, "not")
        made, job = rig.ask_restore(backup, "left", allow_damaged=True)
        assert rig.succeed(job).result[1] == f"sda: missing offset=0 length={8 << 40}"
        assert rig.volume(rig.engine.vm(made).disks[1]).read_bytes() == b"x" * MIB


def test_what_a_verify_found_is_said_though_it_fails_later(
    hit: Hit, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, _, backup, pack = hit

    def away(_domain: Domain) -> list[Finding]:
        raise PointUnreachable("the point went")

    monkeypatch.setattr("engine.points.upkeep.check_view", away)
    with rig:
        ended = rig.ended(rig.engine.start_maintenance("verify", rig.point_uuid, True))
        assert (ended.state, ended.error) == ("failed", "the point went")
        assert any(str(pack) in line and backup.uuid in line for line in ended.result)


@pytest.mark.parametrize("how", ["verify", "restore"])
def test_what_was_found_is_remembered_over_a_restart_and_healed(hit: Hit, how: str) -> None:
    rig, vm, backup, _ = hit
    with rig:
        if how == "verify":
            job = rig.engine.start_maintenance("verify", rig.point_uuid, True)
        else:
            _, job = rig.ask_restore(backup, "left", allow_damaged=True)
        ended = rig.ended(job)
        if how == "verify":
            assert ended.state == "failed"
            assert any(backup.uuid in line and "0+2097152" in line for line in ended.result)
        rig.restart()
        rig.back_up(vm, full=True)
        assert rig.restore(backup, "again") == [rig.volume(d).read_bytes() for d in vm.disks]
        rig.succeed(rig.engine.start_maintenance("verify", rig.point_uuid, True))


def test_what_a_gc_found_is_remembered_over_a_restart_and_healed(tmp_path: Path) -> None:
    with EngineRig(tmp_path / "data") as rig:
        kept = random_bytes(2 * MIB, 1)
        vm = rig.make_vm("vm", kept + random_bytes(6 * MIB, 2))
        first = rig.back_up(vm)
        damage_chunks(rig, kept[:MIB])
        volume = rig.volume(vm.disks[0])
        volume.write_bytes(kept + random_bytes(6 * MIB, 3))
        second = rig.back_up(vm)
        rig.engine.delete_backup(EVERYWHERE, first.uuid)
        job = rig.succeed(rig.engine.start_maintenance("gc", rig.point_uuid, False))
        assert any(line.startswith("damaged: ") for line in job.result)
        rig.restart()
        rig.back_up(vm, full=True)
        assert rig.restore(second, "again") == [volume.read_bytes()]


def test_an_interrupted_deep_verify_goes_on_where_it_stopped(hit: Hit) -> None:
    rig, vm, _, _ = hit
    with rig:
        rig.back_up(vm, full=True)
        reads = rig.core.state.pack_reads
        first = rig.ended(rig.engine.start_maintenance("verify", rig.point_uuid, True))
        assert first.state == "failed"
        assert all(row.pack for row in reads.values()), "a whole one leaves no mark to go on from"


def test_an_incremental_does_not_build_on_what_is_known_to_be_damaged(hit: Hit) -> None:
    """What it could not give back would be acknowledged; the disk is there to be read instead."""
    rig, vm, backup, _ = hit
    with rig:
        verify = rig.engine.start_maintenance("verify", rig.point_uuid, True)
        assert rig.ended(verify).state == "failed"
        second = rig.back_up(vm)
        assert "sda full: of the parent's chunks some are damaged" in second.label.notes
        assert "changes found by: sdb scan" in second.label.notes
        contents = [rig.volume(disk).read_bytes() for disk in vm.disks]
        trust = rig.core.points.domain(rig.point_uuid, rig.cluster_uuid).trust
        assert trust.is_whole(), "what was healed is not looked for in all maps to come"
        assert rig.restore(second, "copy") == contents
        assert rig.restore(backup, "healed") == contents
        third = rig.back_up(vm)
        assert "changes found by: sda scan, sdb scan" in third.label.notes


class Mended(dict[str, StorageError]):
    """What was damaged is found whole between two looks at it."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) and bool(self.pop(str(key)))


def test_a_domain_that_was_just_mended_is_not_an_error_of_its_own(hit: Hit) -> None:
    rig, _, _, _ = hit
    with rig:
        points = rig.core.points
        keeper = Keeper(points.state(rig.point_uuid).point, points._around)
        keeper._looks = 1  # its thread is not started, so nobody else changes what it has
        damaged = Mended({rig.cluster_uuid: Damaged("a record is missing")})
        keeper._opened = replace(points.opened(rig.point_uuid), damaged=damaged)
        with pytest.raises(Damaged):
            keeper.domain(rig.cluster_uuid)
        damaged.clear()
        assert keeper.domain(rig.cluster_uuid) is points.domain(rig.point_uuid, rig.cluster_uuid)
