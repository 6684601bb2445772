"""Deleting a backup.

FORGET is durable on the point before the catalogue forgets, and that before we answer. If we die in
between, the next look at the point says that the backup is gone.
"""

from __future__ import annotations

import logging

from engine.core import Core
from engine.errors import Conflict
from engine.model import BACKUP_DONE, BACKUP_RUNNING
from engine.snapshot.baseline_tending import tend_baselines
from engine.verb_types import Scope
from storage.errors import NotOnPoint

log = logging.getLogger(__name__)

RECLAIM_TIMEOUT_S = 30.0


def delete_backup(core: Core, scope: Scope, backup_uuid: str) -> None:
    """Deletes it here and on the point, durably. Conflict(backup_running), NotFound, StorageError.

    Waits for its turn if others delete from the point. Room comes back before this returns, or, if
    that takes long, soon after.
    """
    row = core.backup_in(scope, backup_uuid)
    if row.status == BACKUP_RUNNING:
        raise Conflict("backup_running", f"backup {row.uuid} is being made")
    if row.status == BACKUP_DONE:
        domain = core.points.require_answering(row.point_uuid, row.cluster_uuid)
        try:
            with core.points.turn(row.point_uuid, "delete"):
                domain.forget([row.uuid])
        except NotOnPoint:
            log.info("backup_gone_already", extra={"backup": row.uuid})
    core.catalogue.remove(row)
    if row.status == BACKUP_DONE:
        core.points.reclaim(row.point_uuid, RECLAIM_TIMEOUT_S)
        tend_baselines(core)
    log.info("backup_deleted", extra={"backup": row.uuid})
