"""Writing the bundles of a log: see storage.format.bundles."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from storage.errors import PointFull, PointReadOnly, StorageError, translated
from storage.files.ballast import reserve_bytes
from storage.format.bundles import FILE_LIMIT_BYTES, stretch_of
from storage.view import tables

if TYPE_CHECKING:
    from storage.domain.domain import Domain

STRETCHES_PER_CALL = 16

log = logging.getLogger(__name__)


class Bundling:
    """One domain's, as one host sees to it. One thread at a time."""

    def __init__(self) -> None:
        self._next = 1  # the first record of the first stretch that may have no bundle

    def go_on(self, domain: Domain) -> int:
        """Looks at some full stretches of the log, and bundles those that are not yet; returns how
        many. What it meets on the point is no error: for want of room they are tried again, and one
        that can't be read is left to the next start and to the check.
        """
        applied, _ = domain.view.ask(tables.applied)
        made = 0
        for _ in range(STRETCHES_PER_CALL):
            _, last = stretch_of(self._next)
            if last > applied:
                break
            try:
                if not _has_room(domain):
                    break
                made += domain.records.bundle(self._next)
            except (PointFull, PointReadOnly):
                break
            except StorageError as error:
                log.warning(
                    "records_not_bundled", extra={"domain": domain.paths.root, "error": str(error)}
                )
            self._next = last + 1
        return made


def _has_room(domain: Domain) -> bool:
    """A bundle only saves time: it does not take the room that deleting needs."""
    with translated(domain.paths.log):
        room = domain.fs.room(domain.paths.log)
    return room.free_bytes >= FILE_LIMIT_BYTES + reserve_bytes(room)
