"""What hosts that are gone for good have left on a point, cleared by another host of the domain.

Their sessions' files are cleared with the sessions (storage.domain.orphans). What is left is their
own: files that had no name yet (`tmp/host-…`, a copied checkpoint may be large), their views on a
local point, their heartbeats. A host is taken for gone when its heartbeat has stood still for the
observer's whole patience, by the observer's clock alone, and it has no open session. The patience
is longer than that with sessions, so that a host that is serviced for an hour keeps its view.

Taking a living host for gone costs it one failed write, which is repeated: what lies in its tmp/
directory is in no record, and a name in the log comes only from a file that is still there. Its
view is left alone while any process has it open.
"""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING

from storage.domain import orphans
from storage.domain.heartbeats import Heartbeat, read_beats
from storage.errors import PointFull, PointReadOnly, StorageError, translated
from storage.lmdb_env.lock_file import is_occupied
from storage.view import tables
from storage.view.view import destroy

if TYPE_CHECKING:
    from storage.domain.domain import Domain

GONE_AFTER_S = 24 * 3600.0

_HOST = re.compile("[0-9A-Za-z_-]{1,64}")

log = logging.getLogger(__name__)


class Leftovers:
    """One domain's, as one host sees them. One thread at a time."""

    def __init__(self, patience_s: float = GONE_AFTER_S) -> None:
        self._patience_s = patience_s
        self._seen: dict[str, tuple[Heartbeat | None, float]] = {}

    def clear(self, domain: Domain, now_s: float) -> int:
        """Clears what silent hosts have left; returns how many hosts. Raises StorageErrors.

        `now_s`: any clock of the observer's that never goes back.
        """
        before, self._seen = self._seen, {}
        silent = []
        for host, beat in read_beats(domain, _others(domain)).items():
            known = before.get(host)
            since_s = known[1] if known is not None and known[0] == beat else now_s
            self._seen[host] = (beat, since_s)
            if known is not None and now_s - since_s >= self._patience_s:
                silent.append(host)
        if not silent:
            return 0
        try:
            domain.refresh_to_end()
            domain.records.clear_scratch()
        except (PointFull, PointReadOnly):
            return 0
        with domain.view.read() as state:
            busy = {row.host for _, row in tables.sessions.scan(state)}
        gone = [host for host in silent if host not in busy and _try(domain, host)]
        if gone:
            log.info("hosts_cleared", extra={"domain": domain.paths.root, "hosts": gone})
        return len(gone)


def _others(domain: Domain) -> set[str]:
    """Hosts that have something here. Never ourselves."""
    paths = domain.paths
    with translated(paths.root):
        names = [name for name in domain.fs.listdir(paths.tmp) if name.startswith("host-")]
        found = {name.removeprefix("host-") for name in names}
        found.update(orphans.names_in(domain.fs, paths.hosts))
        # `<host>.…`: a view that was being made, or took another's place.
        found.update(name.partition(".")[0] for name in orphans.names_in(domain.fs, paths.views))
    return {host for host in found if _HOST.fullmatch(host)} - {domain.host}


def _try(domain: Domain, host: str) -> bool:
    """A failure is left for the next time: nothing here is worth a look at the point."""
    try:
        return _cleared(domain, host)
    except StorageError as error:
        log.warning("host_not_cleared", extra={"host": host, "error": str(error)})
        return False


def _cleared(domain: Domain, host: str) -> bool:
    """False when its view is in use: then it lives, and nothing is touched. The heartbeat goes
    last, so that what a kill leaves is found again."""
    views = domain.paths.views
    with translated(views):
        names = [n for n in orphans.names_in(domain.fs, views) if n.partition(".")[0] == host]
        paths = [os.path.join(views, name) for name in names]
        if any(is_occupied(path) for path in paths if not os.path.islink(path)):
            return False
        for path in paths:
            if os.path.islink(path):
                domain.fs.unlink(path)
            destroy(path)
    orphans.remove_directory(domain.fs, domain.paths.host_tmp(host))
    path = os.path.join(domain.paths.hosts, host)
    with translated(path):
        try:
            domain.fs.unlink(path)
        except FileNotFoundError:
            return True
    return True
