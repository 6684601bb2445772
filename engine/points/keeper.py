"""One attached point, kept by a thread of its own.

The thread opens the point and our domains on it, then refreshes at intervals and whenever it is
woken: folds other hosts' records, brings the catalogue up to date, counts room, unlinks dead packs
(those of a large view in a thread beside it, now and then).
So a point that hangs holds this thread and nobody else; everybody else reads what the thread last
saw, and a look that takes too long shows as `unreachable` by itself.

`_lock` guards the members; it is never held while the point is touched.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from engine.catalogue.catalogue import Catalogue
from engine.catalogue.labels import settled_backup
from engine.config import Limits
from engine.errors import NotFound, PointStateError
from engine.host import Host
from engine.inventory.inventory import Places
from engine.model import Backup, BackupPoint, Cluster, Distrust
from engine.points.distrust import recall_distrusted
from engine.state import Rows
from engine.verb_types import PointState, PointStateName
from storage.domain.bundling import Bundling
from storage.domain.domain import Domain
from storage.domain.heartbeats import Observer, beat
from storage.domain.leftovers import Leftovers
from storage.errors import (
    Damaged,
    PointFull,
    PointNewerFormat,
    PointReadOnly,
    PointUnreachable,
    PointUnsafeMount,
    StorageError,
    translated,
)
from storage.files.fs import Room
from storage.point import ClusterLabel, Point

log = logging.getLogger(__name__)

HUNG_AFTER_S = 15.0
BEAT_EVERY_S = 60.0  # a tenth of the patience of those who watch (storage.domain.heartbeats)
FIRST_LOOK_TIMEOUT_S = 5.0
REOPEN_AFTER_S = 60.0
REOPEN_REST = 20.0  # times as long as it took
ROWS_PER_SYNC = 1000

_STATES: tuple[tuple[type[StorageError], PointStateName], ...] = (
    (PointReadOnly, "read_only"),
    (PointFull, "full"),
    (PointUnsafeMount, "unsafe"),
    (Damaged, "damaged"),
    (PointNewerFormat, "newer_format"),
)
_OF_ONE_DOMAIN = (Damaged, PointNewerFormat)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every keeper works with."""

    host: Host
    places: Places
    catalogue: Catalogue
    limits: Limits
    distrusts: Rows[Distrust]


@dataclass(frozen=True, slots=True)
class Opened:
    """A point and the managed clusters' domains on it, by cluster. `damaged`: those that can't be
    opened, or followed, while the others can, and why: Damaged, or PointNewerFormat."""

    point: Point
    domains: dict[str, Domain]
    damaged: dict[str, StorageError]

    def sound(self) -> list[tuple[str, Domain]]:
        """(cluster, domain) of those whose log can be read."""
        return [item for item in self.domains.items() if item[0] not in self.damaged]

    def close(self) -> None:
        for domain in self.domains.values():
            domain.close()
        self.point.close()


class Keeper:
    """See the module. All methods but the thread's own return at once, or within their timeout."""

    def __init__(self, row: BackupPoint, around: Surroundings) -> None:
        self.row = row
        self._around = around
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._opened: Opened | None = None
        self._synced: dict[str, int] = {}
        self._observers: dict[str, Observer] = {}
        self._leftovers: dict[str, Leftovers] = {}
        self._bundlings: dict[str, Bundling] = {}
        self._beats = 0
        self._beat_at_s = float("-inf")
        self._error: StorageError | None = None
        self._seen = PointState(row)
        self._looks = 0
        self._look_began_s: float | None = None
        self._reclaims_wanted = 0
        self._reclaims_done = 0
        self._reclaiming: threading.Thread | None = None
        self._reopens_at_s = 0.0
        self._thread = threading.Thread(target=self._run, name=f"point-{row.name}", daemon=True)

    def start(self) -> None:
        """Begins to open the point."""
        self._thread.start()

    def stop(self) -> None:
        """Tells the thread to close everything and end."""
        self._stopping.set()
        self._wake.set()

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended, or was never started."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # What others ask ------------------------------------------------------------------------

    def opened(self) -> Opened:
        """The open point. Waits a little for the first look at it.

        Raises PointStateError while it is being opened, else the StorageError that keeps it shut.
        """
        with self._lock:
            self._changed.wait_for(lambda: self._looks > 0, FIRST_LOOK_TIMEOUT_S)
            error = self._present_error()
            if error is not None:
                raise _same(error)
            if self._opened is None or self._stopping.is_set():
                raise PointStateError(f"backup point {self.row.name} is not open")
            return self._opened

    def domain(self, cluster_uuid: str) -> Domain:
        """That cluster's domain; raises as `opened`, or NotFound for a cluster not managed."""
        opened = self.opened()
        damage = opened.damaged.get(cluster_uuid)  # which a look may take away at any moment
        if damage is not None:
            raise _same(damage)
        found = opened.domains.get(cluster_uuid)
        if found is None:
            raise NotFound("cluster", cluster_uuid)
        return found

    def state(self) -> PointState:
        """As last seen."""
        with self._lock:
            error = self._present_error()
            seen = replace(self._seen, point=self.row)
            opening = self._looks == 0
        if error is not None:
            seen = replace(seen, state=_state_for(error), last_error=str(error))
        elif opening:
            seen = replace(seen, state="opening")
        return replace(seen, backup_count=self._around.catalogue.count(self.row.uuid))

    def await_look(self, timeout_s: float) -> None:
        """Until a look that began after this call is over, at most `timeout_s`."""
        with self._lock:
            aim = self._looks + (2 if self._look_began_s is not None else 1)
            self._wake.set()
            self._changed.wait_for(lambda: self._looks >= aim, timeout_s)

    def reclaim(self, timeout_s: float) -> bool:
        """Unlinks packs that are dead by now; whether that was done within `timeout_s`.

        What is not done then is done in the background, or by a gc.
        """
        with self._lock:
            self._reclaims_wanted += 1
            aim = self._reclaims_wanted
            self._wake.set()
            return self._changed.wait_for(lambda: self._reclaims_done >= aim, timeout_s)

    def _present_error(self) -> StorageError | None:
        """`_lock` is held."""
        began_s = self._look_began_s
        if began_s is not None and time.monotonic() - began_s > HUNG_AFTER_S and self._looks:
            return PointUnreachable(f"{self.row.path} has not answered for {HUNG_AFTER_S:g} s")
        return self._error

    # The thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._wake.clear()
            if self._stopping.is_set():
                break
            self._look()
            self._wake.wait(self._around.limits.point_refresh_s)
        with self._lock:
            opened, self._opened = self._opened, None
        if self._reclaiming is not None:
            self._reclaiming.join()
        if opened is not None:
            opened.close()

    def _look(self) -> None:
        """Opens, refreshes, reclaims; whatever comes of it can be seen afterwards."""
        with self._lock:
            self._look_began_s = time.monotonic()
            reclaims = self._reclaims_wanted
        error: StorageError | None = None
        try:
            opened = self._reopened(self._opened) if self._opened else self._open()
            self._reclaim(opened, asked=reclaims > self._reclaims_done)
            self._refresh(opened)
        except StorageError as raised:
            error = raised
        except Exception as raised:
            log.exception("point_look_failed", extra={"point": self.row.uuid})
            error = PointUnreachable(f"{self.row.path}: {raised}")
        with self._lock:
            if not self._stopping.is_set():
                self._tell_change(error)
            self._error = error
            self._look_began_s = None
            self._looks += 1
            self._reclaims_done = reclaims
            self._changed.notify_all()

    def _open(self) -> Opened:
        with translated(self.row.path):
            point = Point.open(self.row.path, expect_uuid=self.row.uuid)
            opened = Opened(point, {}, {})
            try:
                for cluster in self._around.places.clusters:
                    self._open_domain(opened, cluster)
                if opened.damaged and not opened.domains:
                    raise next(iter(opened.damaged.values()))
            except BaseException:
                opened.close()
                raise
        self._synced = {}
        self._reopens_at_s = time.monotonic() + REOPEN_AFTER_S
        with self._lock:
            self._opened = opened
        return opened

    def _open_domain(self, opened: Opened, cluster: Cluster) -> None:
        """One of `opened`, or of its damaged ones."""
        row, around = self.row, self._around
        views = os.path.join(around.host.views_path, row.uuid, cluster.uuid)
        seen = os.path.join(self._seen_directory(), cluster.uuid)
        try:
            domain = opened.point.domain(_label(cluster), around.host.id, views, seen_path=seen)
        except _OF_ONE_DOMAIN as error:
            opened.damaged[cluster.uuid] = error
            return
        try:
            recall_distrusted(around.distrusts, row.uuid, cluster.uuid, domain)
        except BaseException:
            domain.close()  # nobody else knows it yet
            raise
        opened.domains[cluster.uuid] = domain
        opened.damaged.pop(cluster.uuid, None)

    def _reopened(self, opened: Opened) -> Opened:
        """With the domains that could not be opened before, and can be now: what was damaged may
        have been mended, or was so for a moment only. It may take long, so it is tried seldom."""
        began_s = time.monotonic()
        left = [one for one in self._around.places.clusters if one.uuid not in opened.domains]
        if not left or began_s < self._reopens_at_s:
            return opened
        try:
            for cluster in left:
                # Others may be going through what there is.
                opened = replace(opened, domains={**opened.domains}, damaged={**opened.damaged})
                self._open_domain(opened, cluster)
                with self._lock:
                    self._opened = opened
        finally:
            now_s = time.monotonic()
            rest_s = max(REOPEN_AFTER_S, REOPEN_REST * (now_s - began_s))
            self._reopens_at_s = now_s + rest_s
        return opened

    def forget_seen(self) -> None:
        """So that the point may be attached again in whatever state it is in then."""
        shutil.rmtree(self._seen_directory(), ignore_errors=True)
        shutil.rmtree(os.path.join(self._around.host.views_path, self.row.uuid), ignore_errors=True)

    def _seen_directory(self) -> str:
        return os.path.join(self._around.host.seen_path, self.row.uuid)

    def _refresh(self, opened: Opened) -> None:
        self._sort_out(opened)
        if time.monotonic() - self._beat_at_s >= BEAT_EVERY_S:
            self._beat(opened)
        anew = [
            domain for cluster_uuid, domain in opened.sound() if cluster_uuid not in self._synced
        ]
        for cluster_uuid, domain in opened.sound():
            seq = domain.refresh()
            if self._synced.get(cluster_uuid) != seq and self._sync(cluster_uuid, domain):
                self._synced[cluster_uuid] = seq
        seen = self._count(opened)
        for domain in anew:  # which was read as a whole for that
            domain.release_memory()
        with self._lock:
            self._seen = seen
        if self._looks:  # nobody waits for this as for the first look
            for cluster_uuid, domain in opened.sound():
                self._bundlings.setdefault(cluster_uuid, Bundling()).go_on(domain)

    def _sort_out(self, opened: Opened) -> None:
        """A domain whose log is damaged, or has a newer format, keeps none of the others from being
        used. Nothing is written to it."""
        for cluster_uuid, domain in opened.domains.items():
            try:
                domain.require_own_past()
                domain.refresh()
                opened.damaged.pop(cluster_uuid, None)
            except _OF_ONE_DOMAIN as error:
                opened.damaged[cluster_uuid] = error
        if opened.damaged and not opened.sound():
            raise _same(next(iter(opened.damaged.values())))

    def _beat(self, opened: Opened) -> None:
        """Shows that we live, ends the sessions of hosts of our clusters that do not, and those of
        our own that nobody works in any more, and clears what those hosts have left."""
        self._beats += 1
        for cluster_uuid, domain in opened.sound():
            ended = self._unless_full(domain.end_left_open)
            self._unless_full(partial(beat, domain, self._beats))
            observer = self._observers.setdefault(cluster_uuid, Observer())
            ended += observer.end_dead_sessions(domain, time.monotonic())
            if ended:
                fields = {"point": self.row.uuid, "cluster": cluster_uuid, "count": ended}
                log.warning("dead_sessions_ended", extra=fields)
            self._leftovers.setdefault(cluster_uuid, Leftovers()).clear(domain, time.monotonic())
        self._beat_at_s = time.monotonic()

    def _unless_full(self, do: Callable[[], int | None]) -> int:
        """What it returns; 0 where there is no room, here or on the point. A heartbeat that is
        missed costs at most a session, and a full point has to stay open for deletes."""
        try:
            return do() or 0
        except PointFull as error:
            log.warning("no_room_to_beat", extra={"point": self.row.uuid, "error": str(error)})
            return 0

    def _sync(self, cluster_uuid: str, domain: Domain) -> bool:
        """After the first time only what the records since then have changed is looked at. In
        portions: what is read of a domain is many times what the catalogue keeps of it."""
        synced = self._synced.get(cluster_uuid)
        changed: Collection[str] | None = None
        if synced is not None:
            changed = domain.changed_backups(synced)
        if changed is None:
            known = self._around.catalogue.uuids(cluster_uuid, self.row.uuid)
            changed = domain.backup_uuids() | known
            domain.release_memory()
        rest = iter(sorted(changed))
        while some := [*islice(rest, ROWS_PER_SYNC)]:
            if not self._sync_some(cluster_uuid, domain, some):
                return False
            if len(some) == ROWS_PER_SYNC:
                domain.release_memory()
        return True

    def _sync_some(self, cluster_uuid: str, domain: Domain, backups: Collection[str]) -> bool:
        around = self._around

        def read() -> list[Backup]:
            rows = sorted(domain.rows_of(backups), key=lambda row: row.seq)
            if self._stopping.is_set():
                raise PointUnreachable(f"backup point {self.row.name} was detached")
            return [settled_backup(row, cluster_uuid, self.row.uuid, around.places) for row in rows]

        return around.catalogue.sync(cluster_uuid, self.row.uuid, backups, read)

    def _count(self, opened: Opened) -> PointState:
        room = opened.point.room()
        stats = [domain.stats() for domain in opened.domains.values()]
        wrong = sorted(opened.damaged.values(), key=lambda error: not isinstance(error, Damaged))
        return PointState(
            self.row,
            state=_state_for(wrong[0]) if wrong else self._room_state(room),
            last_error=str(wrong[0]) if wrong else "",
            capacity=room.capacity_bytes,
            free=room.free_bytes,
            stored_bytes=sum(one.stored_bytes for one in stats),
            logical_bytes=sum(one.logical_bytes for one in stats),
            chunk_count=sum(one.chunks for one in stats),
            pack_count=sum(one.packs for one in stats),
        )

    def _room_state(self, room: Room) -> PointStateName:
        if not os.access(self.row.path, os.W_OK):
            return "read_only"
        full = room.free_bytes < self._around.limits.point_reserve_bytes
        return "full" if full else "online"

    def _reclaim(self, opened: Opened, *, asked: bool) -> None:
        """What takes long goes on beside the looks: proving a large view (storage.view.proof)."""
        if asked:
            self._reclaim_all([one for one in opened.sound() if one[1].proof.is_quick()])
        slow = [
            (cluster_uuid, domain)
            for cluster_uuid, domain in opened.sound()
            if not domain.proof.is_quick() and domain.proof.is_due() and domain.has_dead_packs()
        ]
        if slow and not (self._reclaiming and self._reclaiming.is_alive()):
            name = f"reclaim-{self.row.name}"
            self._reclaiming = threading.Thread(
                target=self._reclaim_all, args=(slow,), name=name, daemon=True
            )
            self._reclaiming.start()

    def _reclaim_all(self, domains: Sequence[tuple[str, Domain]]) -> None:
        for cluster_uuid, domain in domains:
            try:
                domain.reclaim(copy_budget_bytes=0, cancelled=self._stopping.is_set)
            except StorageError:
                # The delete that asked for it is durable; the next gc unlinks what is left.
                fields = {"point": self.row.uuid, "cluster": cluster_uuid}
                log.warning("reclaim_failed", extra=fields, exc_info=True)

    def _tell_change(self, error: StorageError | None) -> None:
        """`_lock` is held. One line when the point comes or goes, not one at every look."""
        if error is not None and (self._error is None or self._error.code != error.code):
            fields = {"point": self.row.uuid, "path": self.row.path, "error": str(error)}
            log.warning("point_lost", extra=fields)
        elif error is None and (self._error is not None or self._looks == 0):
            log.info("point_online", extra={"point": self.row.uuid, "path": self.row.path})


def _label(cluster: Cluster) -> ClusterLabel:
    return ClusterLabel(
        cluster_uuid=cluster.uuid, cluster_name=cluster.name, cluster_mode=cluster.mode
    )


def _state_for(error: StorageError) -> PointStateName:
    return next((name for kind, name in _STATES if isinstance(error, kind)), "unreachable")


def _same(error: StorageError) -> StorageError:
    """Its like: an exception that is raised in several threads would gather their tracebacks."""
    return next(
        (kind(str(error)) for kind, _ in _STATES if isinstance(error, kind)),
        PointUnreachable(str(error)),
    )
