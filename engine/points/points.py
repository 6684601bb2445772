"""The attached points: which there are, and the way to their domains.

Looking at the list never touches a point. Attaching and probing do, in threads with a timeout
(engine/probes.py); all else goes through the point's keeper (engine/points/keeper.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

from msgspec.structs import replace

from engine.config import PointConfig
from engine.errors import ConfigInvalid, Conflict, Invalid, NotFound
from engine.inventory.inventory import DEFAULT_NAME
from engine.inventory.volumes import directories_above, directory_ids
from engine.model import BackupPoint, PointKind
from engine.points.keeper import Keeper, Opened, Surroundings
from engine.probes import Probes
from engine.state import State, pack_read_key
from engine.turns import Turns
from engine.verb_types import PointState
from storage.domain.domain import Domain
from storage.errors import (
    PointFull,
    PointReadOnly,
    PointUnreachable,
    StorageError,
    translated,
)
from storage.files.fs import Room
from storage.files.mounts import check_mount
from storage.point import Point, is_point

log = logging.getLogger(__name__)

ATTACH_TIMEOUT_S = 15.0
JOIN_TIMEOUT_S = 5.0
LOOK_TIMEOUT_S = 1.0
TURN_TIMEOUT_S = 30.0
AT_ONCE = 2  # of a kind; others wait for their turn, so a point that hangs holds no more threads
MOST_NAME_CHARS = 200

Turn: TypeAlias = Literal["delete", "import", "list"]


class Points:
    """All methods may be called from any thread."""

    def __init__(self, state: State, around: Surroundings, probes: Probes) -> None:
        self._state = state
        self._around = around
        self._probes = probes
        self._lock = threading.Lock()  # of what is in memory
        self._recording = threading.Lock()  # of who attaches; it may hang with the state's medium
        self._turns: dict[Turn, Turns] = {
            kind: Turns(AT_ONCE) for kind in ("delete", "import", "list")
        }
        self._attaching: dict[str, str] = {}  # names of those that are being attached, by place
        self._stopping = threading.Event()
        self._keepers = {row.uuid: Keeper(row, around) for row in state.points.values()}

    def start(self, wanted: tuple[PointConfig, ...]) -> None:
        """Begins to open what is attached, and attaches the configured ones that are not yet.

        One that can't be attached now is tried again and again; this waits only a little for it.
        """
        self._rename(wanted)
        for keeper in self._keepers.values():
            keeper.start()
        known = frozenset(keeper.row.path for keeper in self._keepers.values())
        joining = [
            threading.Thread(target=self._join, args=(point, known), name="join", daemon=True)
            for point in wanted
        ]
        for thread in joining:
            thread.start()
        deadline_s = time.monotonic() + JOIN_TIMEOUT_S
        for thread in joining:
            thread.join(max(deadline_s - time.monotonic(), 0))

    def _rename(self, wanted: tuple[PointConfig, ...]) -> None:
        """An attached point has the name that it is configured with now: its old one may be
        another's. ConfigInvalid for the name of one that is not configured."""
        names = {os.path.normpath(point.path): point.name for point in wanted}
        listed = frozenset(names.values())
        for keeper in self._keepers.values():
            if keeper.row.path not in names and keeper.row.name in listed:
                raise ConfigInvalid(
                    f"points: {keeper.row.name!r} is the name of the attached point at"
                    f" {keeper.row.path}; list that with another name, or use one here"
                )
        for keeper in self._keepers.values():
            name = names.get(keeper.row.path, keeper.row.name)
            if name != keeper.row.name:
                keeper.row = replace(keeper.row, name=name)
                self._state.points.put(keeper.row)

    def make_default(self, path: str) -> None:
        """Attaches the embedded default's point, unless something is attached. StorageError."""
        if not self._keepers:
            with translated(path):
                os.makedirs(path, mode=0o700, exist_ok=True)
            self.attach(DEFAULT_NAME, "local", path)

    def stop(self, timeout_s: float) -> None:
        """Closes all points; those that hang are left to their threads."""
        self._stopping.set()
        keepers = list(self._keepers.values())
        for keeper in keepers:
            keeper.stop()
        deadline_s = time.monotonic() + timeout_s
        for keeper in keepers:
            if not keeper.join(max(deadline_s - time.monotonic(), 0)):
                log.warning("point_not_closed", extra={"point": keeper.row.uuid})

    # Looking --------------------------------------------------------------------------------

    def states(self) -> list[PointState]:
        """All of them, by name, as last seen."""
        with self._lock:
            keepers = list(self._keepers.values())
        return sorted((one.state() for one in keepers), key=lambda s: (s.point.name, s.point.uuid))

    def state(self, uuid: str) -> PointState:
        """NotFound."""
        return self._keeper(uuid).state()

    def opened(self, uuid: str) -> Opened:
        """NotFound, PointStateError, or the StorageError that keeps it shut."""
        return self._keeper(uuid).opened()

    def domain(self, uuid: str, cluster_uuid: str) -> Domain:
        """As `opened`."""
        return self._keeper(uuid).domain(cluster_uuid)

    def require_writable(self, uuid: str, cluster_uuid: str) -> Domain:
        """The domain, after a quick look whether a backup could be written to it now.

        Raises as `opened`, and PointReadOnly, PointFull, PointUnreachable.
        """
        domain = self.domain(uuid, cluster_uuid)
        room = self._probe(self._keeper(uuid).row)
        reserve_bytes = self._around.limits.point_reserve_bytes
        if room.free_bytes < reserve_bytes and domain.salvage.drop():
            room = self._probe(self._keeper(uuid).row)
        if room.free_bytes < reserve_bytes:
            name = self._keeper(uuid).row.name
            raise PointFull(
                f"backup point {name} has {room.free_bytes} bytes left, under {reserve_bytes}"
            )
        return domain

    def require_answering(self, uuid: str, cluster_uuid: str) -> Domain:
        """The domain, after a quick look whether the point answers. As `opened`."""
        domain = self.domain(uuid, cluster_uuid)
        self._probe(self._keeper(uuid).row)
        return domain

    def _probe(self, row: BackupPoint) -> Room:
        timeout_s = self._around.limits.point_probe_timeout_s
        try:
            return self._probes.ask(f"point {row.uuid}", lambda: _look_at(row.path), timeout_s)
        except TimeoutError:
            raise PointUnreachable(f"{row.path}: no answer in {timeout_s:g} s") from None

    # Changing -------------------------------------------------------------------------------

    def attach(self, name: str, kind: str, path: str) -> BackupPoint:
        """Attaches what is at `path`; an empty directory becomes a point. Durable on return.

        Invalid, Conflict(name_taken, point_in_use), and the StorageErrors of Point.create and open.
        """
        checked = _checked_kind(kind)
        if not 0 < len(name) <= MOST_NAME_CHARS:
            raise Invalid("name", f"has to have 1 to {MOST_NAME_CHARS} characters")
        if not _is_path(path):
            raise Invalid("path", f"{path!r} is not an absolute path")
        place = self._bounded(f"resolve {path}", lambda: os.path.realpath(path))
        if not _is_path(place):
            raise Invalid("path", f"{path!r} leads to {place!r}, which is not Unicode")
        with self._claimed(name, place):
            self._require_no_pool(place)
            uuid = self._bounded(f"attach {place}", lambda: _open_or_create(place, name, checked))
            row = BackupPoint(uuid=uuid, name=name, kind=checked, path=place)
            keeper = Keeper(row, self._around)
            with self._recording:
                with self._lock:
                    if uuid in self._keepers:
                        raise Conflict("point_in_use", f"the point at {path} is attached already")
                self._state.points.put(row)
                with self._lock:
                    self._keepers[uuid] = keeper
            keeper.start()
        keeper.await_look(JOIN_TIMEOUT_S)
        log.info("point_attached", extra={"point": uuid, "path": place})
        return row

    def _require_no_pool(self, place: str) -> None:
        names = {place, directory_ids(self._probes, [place]).get(place)}
        pools = self._around.places.pools
        above = directories_above(self._probes, [pool.path for pool in pools])
        for pool in pools:
            if names & above[pool.path]:
                what = f"the directory of pool {pool.name!r}, or holds it"
                raise Invalid("path", f"{place} is {what}")

    def detach(self, uuid: str) -> None:
        """Lets go of the point; nothing on it changes. NotFound. Whether jobs run is not asked."""
        keeper = self._keeper(uuid)
        _forget(self._state, uuid)
        with self._lock:
            self._keepers.pop(uuid, None)
        keeper.stop()
        if keeper.join(JOIN_TIMEOUT_S):
            keeper.forget_seen()
        self._around.catalogue.remove_point(uuid)
        log.info("point_detached", extra={"point": uuid, "path": keeper.row.path})

    def erase(self, uuid: str) -> None:
        """Deletes all backups in our own domains on the point, and what only they need.

        As `domain`, also when one of them can't be used, and `turn`: nothing was deleted then.
        """
        clusters = self._around.places.clusters
        with self.turn(uuid, "delete"):
            for domain in [self.domain(uuid, cluster.uuid) for cluster in clusters]:
                domain.refresh()
                backups = [row.backup for row in domain.backups()]
                if backups:
                    domain.forget(backups)
                domain.reclaim(copy_budget_bytes=0)

    def look_again(self, uuid: str, timeout_s: float = LOOK_TIMEOUT_S) -> None:
        """Brings what is known of the point up to date, if that takes no longer than `timeout_s`;
        else it happens in the background. One that is gone is no error."""
        with self._lock:
            keeper = self._keepers.get(uuid)
        if keeper is not None:
            keeper.await_look(timeout_s)

    @contextlib.contextmanager
    def turn(self, uuid: str, kind: Turn) -> Iterator[None]:
        """For one of the few that may do that to the point at once, and may hang with it. NotFound;
        PointUnreachable when they hang."""
        path = self._keeper(uuid).row.path
        detail = f"other calls of this kind ({kind}) have taken {TURN_TIMEOUT_S:g} s; ask again"
        with self._turns[kind].one(uuid, TURN_TIMEOUT_S, PointUnreachable(f"{path}: {detail}")):
            yield

    def reclaim(self, uuid: str, timeout_s: float) -> bool:
        """Unlinks dead packs; whether it was done in time. One that is gone is no error."""
        with self._lock:
            keeper = self._keepers.get(uuid)
        return keeper is None or keeper.reclaim(timeout_s)

    def _keeper(self, uuid: str) -> Keeper:
        with self._lock:
            keeper = self._keepers.get(uuid)
        if keeper is None:
            raise NotFound("backup_point", uuid)
        return keeper

    @contextlib.contextmanager
    def _claimed(self, name: str, place: str) -> Iterator[None]:
        """Nobody else takes the name, or this place, or one inside or around it, meanwhile."""
        with self._lock:
            taken = {keeper.row.path: keeper.row.name for keeper in self._keepers.values()}
            taken |= self._attaching
            if name in taken.values():
                raise Conflict("name_taken", f"a backup point named {name!r} is attached")
            for other in taken:
                if _overlap(place, other):
                    raise Conflict("point_in_use", f"{place} overlaps the point at {other}")
            self._attaching[place] = name
        try:
            yield
        finally:
            with self._lock:
                del self._attaching[place]

    def _bounded(self, key: str, question: Callable[[], str]) -> str:
        try:
            return self._probes.ask(key, question, ATTACH_TIMEOUT_S)
        except TimeoutError:
            raise PointUnreachable(f"{key}: no answer in {ATTACH_TIMEOUT_S:g} s") from None

    def _join(self, wanted: PointConfig, known: frozenset[str]) -> None:
        """Attaches a configured point, however long it takes to appear."""
        if os.path.realpath(wanted.path) in known:  # may hang; so does only this thread
            return
        while not self._stopping.is_set():
            try:
                self.attach(wanted.name, wanted.kind, wanted.path)
                return
            except Conflict as error:
                log.warning("point_not_attached", extra={"path": wanted.path, "error": str(error)})
                return
            except (Invalid, StorageError) as error:
                log.warning("point_not_attached", extra={"path": wanted.path, "error": str(error)})
            self._stopping.wait(self._around.limits.point_refresh_s)


def _forget(state: State, uuid: str) -> None:
    """The point's row, and when its packs were read: a row for each pack, which every verify of
    another point would go through for good. What is damaged there stays known: it may come back."""
    with state.store.write() as txn:
        state.points.delete_in(txn, uuid)
        read = [row.pack for row in state.pack_reads.each_in(txn) if row.point_uuid == uuid]
        for pack in read:
            state.pack_reads.delete_in(txn, pack_read_key(uuid, pack))


def _checked_kind(kind: str) -> PointKind:
    if kind == "local":
        return "local"
    if kind == "nfs":
        return "nfs"
    raise Invalid("kind", f"{kind!r} is not one of local, nfs")


def _is_path(path: str) -> bool:
    try:
        return os.path.isabs(path) and b"\0" not in path.encode()
    except UnicodeEncodeError:
        return False


def _open_or_create(path: str, name: str, kind: PointKind) -> str:
    """The uuid of the point at `path`."""
    # Before anything is written: an NFS mount that is not there must not become a local point.
    with translated(path), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        found = check_mount(path, file.read())
    if not found.problem and found.kind != kind:
        raise Invalid("kind", f"{path} is {found.kind}, not {kind}")
    point = Point.open(path) if is_point(path) else Point.create(path, name)
    point.close()
    return point.uuid


def _look_at(path: str) -> Room:
    """Its room, if it is there and may be written to."""
    if not is_point(path):
        raise PointUnreachable(f"{path} holds no backup point now")
    if not os.access(path, os.W_OK):
        raise PointReadOnly(f"{path} can't be written to")
    with translated(path):
        found = os.statvfs(path)
    return Room(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)


def _overlap(one: str, other: str) -> bool:
    shared = os.path.commonpath([one, other])
    return shared in (one, other)
