"""Checks in the VM: everything goes as it should."""

from __future__ import annotations

import json
import subprocess
import sys

from engine.config import ClusterConfig, Config, Limits
from storage.view.listing import BackupRow
from tests.engine_rig import ANYWHERE, EngineRig
from tests.nfs.guest import server
from tests.nfs.guest.site import KIB, MIB, NfsRig, Site, clean, pack_files
from tests.rig import random_bytes, write_at
from tests.store import new_uuid


def collect_garbage(rig: EngineRig) -> None:
    rig.succeed(rig.engine.start_maintenance("gc", rig.point_uuid, deep=False))


def round_trip(site: Site) -> None:
    """create, full, incremental, restore, delete with gc; `vmkeep point check --deep` all along."""
    with NfsRig(site.local / "data", site.point) as rig:
        system = random_bytes(3 * MIB, 1) + bytes(2 * MIB) + random_bytes(100 * KIB, 2)
        content = random_bytes(2 * MIB, 3)
        vm = rig.make_vm("web", system, content)
        full = rig.back_up(vm)
        write_at(rig.volume(vm.disks[0]), MIB + 5, b"changed")
        write_at(rig.volume(vm.disks[0]), 3 * MIB, random_bytes(MIB, 4))
        changed = rig.volume(vm.disks[0]).read_bytes()
        incremental = rig.back_up(vm)
        assert incremental.parent == full.uuid
        assert rig.restore(full, "old") == [system, content]
        assert rig.restore(incremental, "new") == [changed, content]
        checked = deep_check(site)
        assert checked["backups"] == 2
        assert checked["packs"] == len(pack_files(site.point)) == 2

        rig.engine.delete_backup(ANYWHERE, full.uuid)
        collect_garbage(rig)
        assert rig.restore(incremental, "kept") == [changed, content]
        clean(site.point)
        rig.engine.delete_backup(ANYWHERE, incremental.uuid)
        collect_garbage(rig)
        assert pack_files(site.point) == []
    clean(site.point)


def deep_check(site: Site) -> dict[str, object]:
    """What the command line's checker counted. It must find nothing."""
    command = [sys.executable, "-m", "api.cli", "point", "check", "--deep", "--json"]
    done = subprocess.run([*command, str(site.point)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["findings"] == []
    assert isinstance(report, dict)
    return report


def view_is_in_the_data_directory(site: Site) -> None:
    """LMDB's locks and maps are not sound on NFS."""
    with NfsRig(site.local / "data", site.point) as rig:
        rig.back_up(rig.make_vm("web", random_bytes(MIB, 1)))
        views = site.local / "data" / "views" / rig.point_uuid
        assert [path.name for path in views.rglob("data.mdb")] == ["data.mdb"]
        assert list(site.point.rglob("*.mdb")) == []
        domain = rig.core.points.domain(rig.point_uuid, rig.cluster_uuid)
        assert str(views) in domain.view.path
        assert rig.engine.point(rig.point_uuid).point.kind == "nfs"


def imported_by_a_second_cluster(site: Site) -> None:
    """Hard links over NFS: what the first cluster deletes, the second still has."""
    content = random_bytes(2 * MIB, 1)
    with (
        NfsRig(site.local / "one", site.point) as one,
        NfsRig(site.local / "two", site.point) as two,
    ):
        backup = one.back_up(one.make_vm("web", content))
        (found,) = two.engine.remote_backups(two.cluster_uuid, two.point_uuid).backups
        assert (found.backup.uuid, found.cluster.uuid) == (backup.uuid, one.cluster_uuid)
        two.engine.import_backups(two.cluster_uuid, [(backup.uuid, two.point_uuid)])
        assert {path.stat().st_nlink for path in pack_files(site.point)} == {2}
        one.engine.delete_backup(ANYWHERE, backup.uuid)
        collect_garbage(one)
        assert len(pack_files(site.point)) == 1
        assert two.restore(two.engine.backup(ANYWHERE, backup.uuid), "copy") == [content]
    clean(site.point)


def two_hosts_in_one_domain(site: Site) -> None:
    """Each sees the point through a mount with caches of its own, and believes stale names at
    first: appends collide, backups build on one another's chunks, one deletes what both see."""
    cluster = ClusterConfig("shared", new_uuid())
    config = Config(clusters=(cluster,), limits=Limits(point_reserve_bytes=0, point_refresh_s=60))
    content, other = random_bytes(2 * MIB, 1), random_bytes(MIB, 2)
    with server.mounted("second", server.SOUND) as second:
        seen = second / site.point.relative_to(server.MOUNTED / "big")
        with (
            NfsRig(site.local / "one", site.point, config) as one,
            NfsRig(site.local / "two", seen, config) as two,
        ):
            web = one.make_vm("web", content)
            first = one.back_up(web)
            # The second host's next append finds the number taken, and folds what came.
            same = two.back_up(two.make_vm("mail", content + other))
            assert {first.uuid, same.uuid} <= {row.backup for row in _rows(two)}
            assert len(pack_files(site.point)) == 2
            assert sum(path.stat().st_size for path in pack_files(site.point)) < 4 * MIB
            again = one.back_up(web)
            assert {same.uuid, again.uuid} <= {row.backup for row in _rows(one)}
            two.core.points.look_again(two.point_uuid, 60)
            assert two.restore(two.engine.backup(ANYWHERE, first.uuid), "theirs") == [content]
            one.engine.delete_backup(ANYWHERE, first.uuid)
            one.engine.delete_backup(ANYWHERE, again.uuid)
            collect_garbage(one)
            assert two.restore(same, "own") == [content + other]
            collect_garbage(two)
    clean(site.point)


def _rows(rig: EngineRig) -> list[BackupRow]:
    return rig.core.points.domain(rig.point_uuid, rig.cluster_uuid).backups()
