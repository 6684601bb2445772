"""Checks in the VM: the export is full, names of deleted files stay, files vanish while open, or
change behind the client's back."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from engine.errors import Conflict
from engine.snapshot.freeze import NO_HOOK
from engine.snapshot.snapshot import take_snapshot
from engine.snapshot.sources import DiskFile
from storage.domain.domain import Domain
from storage.domain.reader import plan_reads
from storage.errors import PointFull
from storage.point import Point
from tests.engine_rig import ANYWHERE
from tests.nfs.guest import server
from tests.nfs.guest.ordinary import collect_garbage
from tests.nfs.guest.site import KIB, MIB, NfsRig, Site, clean, pack_files
from tests.rig import random_bytes, write_at
from tests.store import Saved, cluster, load, new_uuid, save

LEFT_BYTES = 5 * MIB
BIG_BYTES = 12 * MIB  # of noise: more than what is left, but the client takes it all


def full_only_at_fsync(site: Site) -> None:
    """The backup fails as `point_full`, nothing is acknowledged, and there is room afterwards."""
    small = server.MOUNTED / "small"
    (small / "point").mkdir()
    with NfsRig(site.local / "data", small / "point") as rig:
        content = random_bytes(2 * MIB, 1)
        kept = rig.back_up(rig.make_vm("small", content))
        hog = _fill(small)
        _expect_the_trap(small / "trap")
        vm = rig.make_vm("big", random_bytes(BIG_BYTES, 2))
        backup, job = rig.ask_backup(vm)
        ended = rig.ended(job)
        assert ended.state == "failed"
        assert os.strerror(errno.ENOSPC) in ended.error, ended.error
        site.note(ended.error)
        domain = rig.core.points.domain(rig.point_uuid, rig.cluster_uuid)
        assert [row.backup for row in domain.backups()] == [kept.uuid]
        assert rig.restore(kept, "copy") == [content]
        _refuse_in_storage(site, domain.paths.root)
        assert len(pack_files(small / "point")) == 1, "nothing of the failed one is left"
        hog.unlink()
        again = rig.back_up(rig.engine.vm(vm.uuid))
        assert again.uuid != backup
        assert rig.restore(again, "big-copy") == [random_bytes(BIG_BYTES, 2)]
        rig.engine.delete_backup(ANYWHERE, again.uuid)
        collect_garbage(rig)
    clean(small / "point")


def _fill(place: Path) -> Path:
    """A file of somebody else's, at the server, that leaves LEFT_BYTES."""
    hog = server.EXPORTED / place.name / "hog"
    room = os.statvfs(place)
    with hog.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - LEFT_BYTES)
        os.fsync(file.fileno())
    return hog


def _expect_the_trap(path: Path) -> None:
    """What makes this check worth while: all writes succeed, fsync says ENOSPC, and only once."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for number in range(BIG_BYTES // MIB):
            assert os.write(fd, random_bytes(MIB, number)) == MIB
        try:
            os.fsync(fd)
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
        else:
            raise AssertionError("there was room")
        os.fsync(fd)
    finally:
        os.close(fd)
        path.unlink()


def _refuse_in_storage(site: Site, domain_root: str) -> None:
    """The same for a second cluster, below the engine: the very error, and a clean end."""
    with (
        closing(Point.open(str(Path(domain_root).parents[1]))) as point,
        closing(point.domain(cluster(), new_uuid(), str(site.local / "views"))) as domain,
    ):
        try:
            save(domain, random_bytes(BIG_BYTES, 3))
        except PointFull as error:
            assert error.code == "point_full"  # noqa: PT017
        else:
            raise AssertionError("there was room")
        assert domain.backups() == []


def names_of_deleted_files(site: Site) -> None:
    """A pack deleted while this client has it open stays as `.nfsXXXX`: no orphan, no obstacle."""
    with (
        closing(Point.create(str(site.point), "p", chunk_size=64 * KIB)) as point,
        closing(point.domain(cluster(), new_uuid(), str(site.local / "views"))) as domain,
    ):
        kept, gone = save(domain, random_bytes(MIB, 1)), save(domain, random_bytes(MIB, 2))
        fd = os.open(pack_files(site.point)[0], os.O_RDONLY)
        domain.forget([gone.backup, kept.backup])
        domain.reclaim()
        (left,) = pack_files(site.point)
        assert left.name.startswith(".nfs")
        clean(site.point)
        again = save(domain, random_bytes(MIB, 3))
        assert domain.reclaim().orphans_removed == 0
        assert len(os.pread(fd, MIB, 0)) == MIB, "whoever reads it goes on"
        os.close(fd)
        domain.reclaim()
        assert load(domain, again) == random_bytes(MIB, 3)
        assert len(pack_files(site.point)) == 1
        assert not left.parent.exists(), "its directory went with the next gc"
    clean(site.point)


def pack_moved_while_open_by_another_host(site: Site) -> None:
    """Another host's gc deletes a pack that we have open: ESTALE. The chunks are found again."""
    first, second = random_bytes(MIB, 1), random_bytes(256 * KIB, 2)
    with _two_hosts(site) as (ours, theirs):
        both = save(ours, first + second)
        kept = save(ours, second)
        _read_across_a_move(ours, theirs, both, kept, second)
    clean(site.point)


def _read_across_a_move(
    ours: Domain, theirs: Domain, both: Saved, kept: Saved, content: bytes
) -> None:
    reader = ours.reader()
    buffer = memoryview(bytearray(2 * MIB))
    (run,) = plan_reads(ours, ours.disk_map(kept.disk))
    with ours.begin("read", [kept.backup]) as session:
        assert len(list(reader.read(run, buffer))) == len(run.frames) > 0
        theirs.begin("read").end()  # an append, which finds the number taken, makes sure
        theirs.forget([both.backup])
        assert theirs.reclaim().packs_repacked == 1
        # Until it restarts the server would keep the file, since we have it open.
        server.stop_serving()
        server.start_serving()
        server.run("sysctl", "-q", "vm.drop_caches=3")
        read = {place.targets: bytes(raw) for place, raw in reader.read(run, buffer)}
        assert b"".join(read[targets] for targets in sorted(read)) == content
        session.end()
    reader.close()


def stale_names_delete_nothing(site: Site) -> None:
    """A client may believe for a minute that the log has no next record. A gc on such a host must
    not take the files of what is written there meanwhile for nobody's."""
    content = random_bytes(MIB, 1)
    with _two_hosts(site) as (ours, theirs):
        save(ours, random_bytes(MIB, 2))
        theirs.begin("read").end()  # an append makes sure
        known = theirs.refresh()  # and this asks for the record after it, which is not there
        acknowledged = save(ours, content)
        for listing in (theirs.paths.packs, theirs.paths.manifests):
            os.mkdir(os.path.join(listing, "x"))  # makes this client list them afresh
            os.rmdir(os.path.join(listing, "x"))
        stale = theirs.refresh() == known
        theirs.reclaim()
        assert load(ours, acknowledged) == content
        site.note(f"the other host's names were {'stale' if stale else 'not stale'}")
    clean(site.point)


def volume_that_another_host_writes_to(site: Site) -> None:
    """A direct read ends with `volume_changed`, though the client tells of the file as it was."""
    volume = site.point.parent / "volume"
    volume.write_bytes(random_bytes(MIB, 1))
    with take_snapshot([DiskFile("vda", str(volume))], NO_HOOK) as snapshot:
        snapshot.verify_unchanged()
        before = volume.stat().st_mtime_ns
        write_at(server.EXPORTED / volume.relative_to(server.MOUNTED), 0, b"theirs")
        site.note(f"the client {'knew' if volume.stat().st_mtime_ns != before else 'did not know'}")
        try:
            snapshot.verify_unchanged()
        except Conflict as error:
            assert error.code == "volume_changed"  # noqa: PT017
        else:
            raise AssertionError("a backup of it would be acknowledged")


@contextmanager
def _two_hosts(site: Site) -> Iterator[tuple[Domain, Domain]]:
    """Two hosts' views of one domain, through mounts with caches of their own."""
    label = cluster()
    with server.mounted("elsewhere", server.SOUND) as mounted:
        seen = mounted / site.point.relative_to(server.MOUNTED / "big")
        with (
            closing(Point.create(str(site.point), "p", chunk_size=64 * KIB)) as point,
            closing(Point.open(str(seen))) as same,
            closing(point.domain(label, new_uuid(), str(site.local / "one"))) as ours,
            closing(same.domain(label, new_uuid(), str(site.local / "two"))) as theirs,
        ):
            yield ours, theirs
