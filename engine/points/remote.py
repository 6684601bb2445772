"""Everything that is on a point, whoever made it; and taking some of it into a cluster of ours.

Slow: reads the logs of all domains. Other clusters' labels are shown as they are, and not believed.
An import is all or nothing, also over several points: what was taken before the one that failed is
forgotten again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.catalogue.labels import decode_label, encode_label, imported, settled_backup
from engine.core import Core
from engine.errors import Conflict, EngineError, Invalid, NotFound
from engine.ids import canonical, normal
from engine.inventory.inventory import find
from engine.model import Backup, Cluster
from engine.points.keeper import Opened
from engine.verb_types import RemoteBackup, RemoteListing
from storage.errors import (
    Damaged,
    NotOnPoint,
    PointNewerFormat,
    PointUnreachable,
    Refused,
    StorageError,
)
from storage.point import ClusterLabel
from storage.view.listing import BackupRow

log = logging.getLogger(__name__)

MOST_IMPORTED = 10_000


@dataclass(frozen=True, slots=True)
class _Found:
    """A wanted backup and where it is. `source` is the cluster whose domain has it."""

    backup_uuid: str
    point_uuid: str
    source: str


def remote_backups(core: Core, cluster_uuid: str, point_uuid: str) -> RemoteListing:
    """All backups of all domains on the point, newest first. NotFound, StorageError."""
    ours = {cluster.uuid: cluster for cluster in core.inventory.places.clusters}
    cluster = find("cluster", [*ours.values()], normal(cluster_uuid))
    point_uuid = normal(point_uuid)
    core.points.require_answering(point_uuid, cluster.uuid)
    opened = core.points.opened(point_uuid)
    unread: dict[str, StorageError] = {}
    with core.points.turn(point_uuid, "list"):
        found = [
            RemoteBackup(
                _as_found(row, label, point_uuid), ours.get(label.cluster_uuid) or _cluster(label)
            )
            for label, row in _rows(opened, unread)
        ]
    found.sort(key=lambda one: (-one.backup.label.create_time, one.backup.uuid))
    # What else somebody has put there is no cluster's.
    codes = {name: error.code for name, error in unread.items() if canonical(name) == name}
    return RemoteListing(found, codes)


def import_backups(
    core: Core, cluster_uuid: str, wanted: Sequence[tuple[str, str]]
) -> list[RemoteBackup]:
    """Takes the wanted (backup, point) into the cluster, durably: all or none.

    Those that are in it already are no error. Conflict(name_taken) for one that has the uuid of a
    backup of ours on another point. Invalid, StorageError; NotFound, but PointNewerFormat when it
    may be in a domain that only a newer version can read.
    """
    core.jobs.refuse_if_stopping()
    cluster = find("cluster", core.inventory.places.clusters, normal(cluster_uuid))
    if not 0 < len(wanted) <= MOST_IMPORTED:
        raise Invalid("backup", f"has to have 1 to {MOST_IMPORTED} entries")
    asked = list(dict.fromkeys((normal(uuid), normal(point)) for uuid, point in wanted))
    found = _locate(core, cluster, asked)
    _require_ours_stay(core, cluster, found)
    taken: list[Backup] = []
    fresh: list[Backup] = []
    try:
        for point_uuid, source in dict.fromkeys((one.point_uuid, one.source) for one in found):
            uuids = [
                one.backup_uuid
                for one in found
                if (one.point_uuid, one.source) == (point_uuid, source)
            ]
            with core.points.turn(point_uuid, "import"):
                rows, made = _take(core, cluster, point_uuid, source, uuids)
            taken += rows
            fresh += made
        core.catalogue.put_all(fresh)
        for row in fresh:
            core.points.state(row.point_uuid)  # which may have been detached meanwhile
    except BaseException:
        _give_back(core, fresh)
        raise
    for point_uuid in {one.point_uuid for one in found}:
        core.points.look_again(point_uuid)
    log.info("backups_imported", extra={"count": len(fresh), "cluster": cluster.uuid})
    order = {uuid: place for place, (uuid, _) in enumerate(asked)}
    taken.sort(key=lambda row: order[row.uuid])
    return [RemoteBackup(row, cluster) for row in taken]


def _locate(core: Core, cluster: Cluster, asked: Sequence[tuple[str, str]]) -> list[_Found]:
    """Where each is: in the cluster's own domain, else in the first other one. NotFound,
    PointNewerFormat."""
    found = []
    for point_uuid in dict.fromkeys(point for _, point in asked):
        core.points.require_writable(point_uuid, cluster.uuid)
        opened = core.points.opened(point_uuid)
        unread: dict[str, StorageError] = {}
        with core.points.turn(point_uuid, "import"):
            opened.domains[cluster.uuid].refresh()
            where = {row.backup: cluster.uuid for row in opened.domains[cluster.uuid].backups()}
            for label, row in _rows(opened, unread):
                where.setdefault(row.backup, label.cluster_uuid)
        newer = [error for error in unread.values() if isinstance(error, PointNewerFormat)]
        for uuid, point in asked:
            if point == point_uuid:
                if uuid not in where:
                    raise newer[0] if newer else NotFound("backup", uuid)
                found.append(_Found(uuid, point, where[uuid]))
    return found


def _require_ours_stay(core: Core, cluster: Cluster, found: Sequence[_Found]) -> None:
    """A uuid names one backup of a cluster. Who has seen ours may give theirs the same."""
    for one in found:
        if one.source == cluster.uuid:
            continue
        with contextlib.suppress(NotFound):
            ours = core.catalogue.get(one.backup_uuid, cluster.uuid)
            if ours.point_uuid != one.point_uuid:
                detail = f"backup {one.backup_uuid} is one of ours, on another point"
                raise Conflict("name_taken", detail)


def _take(
    core: Core, cluster: Cluster, point_uuid: str, source: str, uuids: Sequence[str]
) -> tuple[list[Backup], list[Backup]]:
    """(all of them as they are here now, those that this call brought), of one domain."""
    places, brought = core.inventory.places, set[str]()
    domain = core.points.domain(point_uuid, cluster.uuid)

    def relabel(row: BackupRow) -> bytes:
        return encode_label(imported(decode_label(row), places))

    try:
        rows = (
            [domain.backup(uuid) for uuid in uuids]
            if source == cluster.uuid
            else domain.import_backups(source, uuids, relabel, brought.update)
        )
    except NotOnPoint as error:
        raise NotFound("backup", _named_in(str(error), uuids)) from error
    settled = [settled_backup(row, cluster.uuid, point_uuid, places) for row in rows]
    return settled, [row for row in settled if row.uuid in brought]


def _give_back(core: Core, fresh: Sequence[Backup]) -> None:
    """Forgets what an import that failed took before."""
    for row in fresh:
        try:
            core.catalogue.remove(row)
            core.points.domain(row.point_uuid, row.cluster_uuid).forget([row.uuid])
            core.points.reclaim(row.point_uuid, 0)
        except (EngineError, StorageError):
            log.exception("import_not_undone", extra={"backup": row.uuid})


def _rows(
    opened: Opened, unread: dict[str, StorageError]
) -> Iterator[tuple[ClusterLabel, BackupRow]]:
    """All domains' backups. Damage to one domain, or a newer format in it, must not hide the
    others: `unread` gets these."""
    for label in opened.point.clusters(unread.__setitem__):
        try:
            rows = opened.point.foreign_backups(label.cluster_uuid)
        except (Damaged, PointNewerFormat, PointUnreachable, Refused) as error:
            if isinstance(error, PointUnreachable):
                opened.point.room()  # raises when it is the point itself
            fields = {"cluster": label.cluster_uuid, "error": str(error)}
            log.warning("domain_unreadable", extra=fields)
            unread[label.cluster_uuid] = error
            continue
        for row in rows:
            yield label, row


def _as_found(row: BackupRow, label: ClusterLabel, point_uuid: str) -> Backup:
    return Backup(
        uuid=row.backup,
        cluster_uuid=label.cluster_uuid,
        point_uuid=point_uuid,
        label=decode_label(row),
        parent=row.parent,
    )


def _cluster(label: ClusterLabel) -> Cluster:
    return Cluster(uuid=label.cluster_uuid, name=label.cluster_name, mode=label.cluster_mode)


def _named_in(text: str, uuids: Sequence[str]) -> str:
    return next((uuid for uuid in uuids if uuid in text), uuids[0])
