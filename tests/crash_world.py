"""A point on the simulated file system, what was acknowledged on it, and the proof after a crash.

`World` does what services do and notes, in this order: what is asked for, then what was
acknowledged. So at any call of the file system it says what must, may and must not be on the point.
`World.prove(disk, ...)` starts services on a crash image and holds them to that.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import tempfile
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar
from unittest import mock

from storage.check.check import CheckReport, check_point
from storage.domain import gc, new_packs
from storage.domain.domain import Domain
from storage.domain.reader import MAX_RUN_BYTES, plan_reads
from storage.domain.session import NewBackup
from storage.errors import NotOnPoint, PointUnreachable
from storage.files import growing
from storage.format import bundles
from storage.log import log as storage_log
from storage.point import ClusterLabel, Point
from tests.simdisk import Disk
from tests.simfs import SimFs
from tests.store import CHUNK, Saved, dump, new_uuid, write_disk

PATH = "/point"
PACK_BYTES = 4096
ResultT = TypeVar("ResultT")
HostKey = tuple[int, str]


class _AtOnce:
    """An executor without a thread: the order of calls is the same in each run."""

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, act: Callable[..., ResultT], *arguments: object) -> Future[ResultT]:
        done: Future[ResultT] = Future()
        try:
            done.set_result(act(*arguments))
        except BaseException as error:  # noqa: BLE001
            done.set_exception(error)
        return done

    def shutdown(self) -> None:
        pass


class Chance:
    """Where all random names come from while `repeatable` holds."""

    source = random.Random(0)

    @classmethod
    @contextlib.contextmanager
    def seeded(cls, seed: str) -> Iterator[None]:
        before, cls.source = cls.source, random.Random(seed)
        try:
            yield
        finally:
            cls.source = before


@contextlib.contextmanager
def repeatable() -> Iterator[str]:
    """Names from Chance, seals without threads, small limits (so that what they bound happens),
    and a scratch directory in memory, which is given."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    scratch = tempfile.mkdtemp(prefix="vmkeep-crash-", dir=memory)
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, scratch)
        for where, name, value in (
            (secrets, "token_hex", lambda size: Chance.source.randbytes(size).hex()),
            (secrets, "token_bytes", lambda size: Chance.source.randbytes(size)),  # noqa: PLW0108
            (uuid, "uuid4", lambda: uuid.UUID(bytes=Chance.source.randbytes(16), version=4)),
            (new_packs, "ThreadPoolExecutor", _AtOnce),
            (storage_log, "RECORDS_PER_EPOCH", 8),
            (bundles, "RECORDS_PER_BUNDLE", 4),
            (gc, "CHAIN_LIMIT", 2),
            (growing, "STAGE_BYTES", 512),
            (tempfile, "tempdir", scratch),
        ):
            undo.enter_context(mock.patch.object(where, name, value))
        yield scratch


@dataclass
class Side:
    """One cluster's domain, as its clients know it."""

    label: ClusterLabel
    live: dict[Saved, bytes] = field(default_factory=dict)
    # Asked for, not acknowledged: each group comes to be, or goes, as a whole or not at all.
    coming: list[dict[Saved, bytes]] = field(default_factory=list)
    going: list[dict[Saved, bytes]] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    unfinished: list[bytes] = field(default_factory=list)  # images of backups that did not come

    def copied(self) -> Side:
        return Side(
            self.label, dict(self.live), list(self.coming), list(self.going), set(self.gone)
        )

    def known(self) -> Hashable:
        """All that `copied` copies."""
        groups = [tuple(tuple(one.items()) for one in many) for many in (self.coming, self.going)]
        label = self.label.cluster_uuid
        return label, tuple(self.live.items()), tuple(groups), frozenset(self.gone)


class Broken(AssertionError):
    """A promise that was not kept."""


def expect(true: object, what: str) -> None:
    if not true:
        raise Broken(what)


class World:
    """Services on one point. `sides`: how many clusters."""

    def __init__(self, scratch: str, sides: int = 2) -> None:
        self.scratch = tempfile.mkdtemp(dir=scratch)
        self.fs = SimFs()
        self.fs.disk.root.name("point", self.fs.disk.new_directory())
        self.fs.disk.root.sync()
        self.point_made = False
        self.sides = [
            Side(ClusterLabel(cluster_uuid=new_uuid(), cluster_name="c")) for _ in range(sides)
        ]
        self.hosts: list[HostKey] = []
        self.domains: dict[HostKey, Domain] = {}
        self._point: Point | None = None

    # What services do.

    def point(self) -> Point:
        if self._point is None:
            if not self.point_made:
                with contextlib.suppress(PointUnreachable):
                    self._point = Point.open(PATH, fs=self.fs)
            if self._point is None:
                make = Point.open if self.point_made else _create
                self._point = make(PATH, fs=self.fs)
            self.point_made = True
        return self._point

    def domain(self, at: int = 0, host: str = "h1") -> Domain:
        key = (at, host)
        if key not in self.hosts:
            self.hosts.append(key)
        if key not in self.domains:
            self.domains[key] = self.point().domain(
                self.sides[at].label, host, self.view_dir(at), pack_size_bytes=PACK_BYTES
            )
        return self.domains[key]

    def view_dir(self, at: int) -> str:
        return os.path.join(self.scratch, f"views-{at}")

    def view_file(self, key: HostKey) -> str:
        return os.path.join(self.view_dir(key[0]), key[1], "data.mdb")

    def save(
        self, image: bytes, parent: Saved | None = None, at: int = 0, host: str = "h1"
    ) -> Saved:
        saved = Saved(new_uuid(), new_uuid(), parent.backup if parent else "")
        self.sides[at].coming.append({saved: image})
        _store(self.domain(at, host), saved, image, parent)
        self.sides[at].coming.remove({saved: image})
        self.sides[at].live[saved] = image
        return saved

    def forget(self, *gone: Saved, at: int = 0, host: str = "h1") -> None:
        side = self.sides[at]
        group = {saved: side.live[saved] for saved in gone}
        side.going.append(group)
        domain = self.domain(at, host)
        try:
            domain.forget([saved.backup for saved in gone])
        except NotOnPoint:
            # An attempt before this one had said that it failed.
            expect(side.going.count(group) > 1, "a backup is not on the point that must be")
        for saved in gone:
            side.live.pop(saved, None)
            side.gone.add(saved.backup)
        side.going = [other for other in side.going if other != group]

    def take_over(self, *wanted: Saved, at: int = 1, source: int = 0) -> None:
        side = self.sides[at]
        theirs = self.sides[source]
        group = {saved: theirs.live[saved] for saved in wanted}
        side.coming.append(group)
        cluster = theirs.label.cluster_uuid
        self.domain(at).import_backups(
            cluster, [saved.backup for saved in wanted], lambda row: row.label
        )
        side.coming = [other for other in side.coming if other != group]
        side.live.update(group)

    def restore(self, saved: Saved, at: int = 0, host: str = "h1") -> None:
        domain = self.domain(at, host)
        with domain.begin("read", [saved.backup]) as reader:
            expect(loaded(domain, saved.disk) == self.sides[at].live[saved], "wrong bytes")
            reader.end()

    def close(self, *, lose: Sequence[HostKey] = ()) -> None:
        for domain in self.domains.values():
            domain.close()
        for key in lose:
            shutil.rmtree(os.path.dirname(self.view_file(key)), ignore_errors=True)
        self.domains.clear()
        self._point = None

    # What must hold after a crash.

    def views(self) -> dict[HostKey, bytes]:
        found = {}
        for key in self.hosts:
            with contextlib.suppress(FileNotFoundError), open(self.view_file(key), "rb") as file:
                found[key] = file.read()
        return found

    def known(self) -> Hashable:
        """What a world after a crash knows; with its disk and views all that its proof goes by."""
        return self.point_made, tuple(self.hosts), tuple(side.known() for side in self.sides)

    def after(self, disk: Disk, views: Mapping[HostKey, bytes]) -> World:
        """A world that starts on a crash image with these views, knowing what this one knows."""
        other = World.__new__(World)
        other.scratch = tempfile.mkdtemp(dir=os.path.dirname(self.scratch))
        other.fs = SimFs(disk)
        other.point_made = self.point_made
        other.sides = [side.copied() for side in self.sides]
        other.hosts = list(self.hosts) or [(0, "h1")]
        other.domains, other._point = {}, None
        for key, content in views.items():
            path = other.view_file(key)
            os.makedirs(os.path.dirname(path))
            with open(path, "wb") as file:
                file.write(content)
        return other

    def prove(self, *, thorough: bool) -> None:
        """Opens everything; raises Broken, or whatever else comes out."""
        hosts = list(self.hosts)
        for at, host in hosts:
            self.domain(at, host)
        for at, _ in hosts:
            self.settle(at)
        self.expect_clean()
        self.go_on(hosts)
        report = self.expect_clean()
        left = [finding for finding in report.findings if finding.kind != "heartbeat"]
        expect(not left, f"left behind: {left[:3]}")
        if thorough:
            for at, host in hosts:
                domain = self.domain(at, host)
                domain.refresh_to_end()
                before = dump(domain)
                domain.rebuild()
                expect(dump(domain) == before, "the view is not what the log says (I8)")

    def settle(self, at: int) -> None:
        """What was asked for has happened or not; from here on it is known which."""
        side = self.sides[at]
        domain = next(domain for key, domain in self.domains.items() if key[0] == at)
        domain.refresh()
        present = {row.backup for row in domain.backups()}
        for group in side.going:
            there = [saved.backup in present for saved in group]
            expect(all(there) or not any(there), "half of a forget")
            if not any(there):
                side.gone |= {saved.backup for saved in group}
                side.live = {s: image for s, image in side.live.items() if s not in group}
        for group in side.coming:
            there = [saved.backup in present for saved in group]
            expect(all(there) or not any(there), "half of a commit")
            if any(there):
                side.live.update(group)
            else:
                side.unfinished += group.values()
        side.going, side.coming = [], []
        wanted = {saved.backup for saved in side.live}
        expect(not wanted - present, f"lost: {wanted - present}")
        expect(not present & side.gone, "forgotten, and back")
        expect(not present - wanted, "nobody asked for this backup")
        self.expect_restores(at, domain)

    def expect_restores(self, at: int, domain: Domain) -> None:
        for saved, image in self.sides[at].live.items():
            expect(loaded(domain, saved.disk) == image, f"wrong bytes in {saved}")

    def expect_clean(self) -> CheckReport:
        report = check_point(PATH, deep=True, fs=self.fs)
        expect(report.clean, f"not clean: {report.findings[:3]}")
        return report

    def go_on(self, hosts: Sequence[HostKey]) -> None:
        """A new backup, of what was interrupted if something was; a gc; and all of it restores."""
        at, host = hosts[0]
        image = [*self.sides[at].unfinished, b"\xee" * CHUNK + b"\xed" * 100][0]
        saved = self.save(image, at=at, host=host)
        for at in sorted({at for at, _ in hosts}):
            host = next(host for where, host in hosts if where == at)
            self.domain(at, host).reclaim(sparse_below=0.9)
            self.expect_restores(at, self.domain(at, host))
        expect(saved in self.sides[hosts[0][0]].live, "the new backup is not there")

    def discard(self) -> None:
        for domain in self.domains.values():
            domain.close()
        shutil.rmtree(self.scratch)


def _create(path: str, *, fs: SimFs) -> Point:
    return Point.create(path, "p", chunk_size=CHUNK, fs=fs)


def _store(domain: Domain, saved: Saved, image: bytes, parent: Saved | None) -> None:
    with domain.begin("backup", [parent.backup] if parent else []) as writing:
        write_disk(writing, domain, image, saved.disk, parent.disk if parent else "")
        writing.commit([NewBackup(saved.backup, b"label", [saved.disk], saved.parent)])


_buffer = memoryview(bytearray(MAX_RUN_BYTES + CHUNK + 4096))


def loaded(domain: Domain, disk: str) -> bytes:
    """A disk backup's content, without a session."""
    disk_map = domain.disk_map(disk)
    image = bytearray(disk_map.capacity)
    reader = domain.reader()
    for run in plan_reads(domain, disk_map):
        for place, raw in reader.read(run, _buffer):
            for target in place.targets:
                image[target * CHUNK : target * CHUNK + len(raw)] = raw
    reader.close()
    return bytes(image)
