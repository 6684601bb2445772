"""The directories that a host's domains have, or had, volumes in, though libvirt has no pool there.

A restore is wanted most right after a VM was lost, and to where its volumes lay. So a directory
that was seen stays a pool when its last domain goes: it is remembered in the state, over restarts,
and is one whenever it exists. Only what libvirt named as a domain's own gets here, and what is not
there (a mount that is late, a VM's own directory that went with it) is no pool meanwhile.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection

from engine.libvirt.rows import directory_uuid
from engine.model import Directory
from engine.probes import Probes
from engine.state import Rows

log = logging.getLogger(__name__)

MOST_DIRECTORIES = 1_000  # remembered of one host
LOOK_TIMEOUT_S = 2.0


class Directories:
    """What is remembered of all hosts. `seen` of one host is not called twice at a time."""

    def __init__(self, rows: Rows[Directory]) -> None:
        self._rows = rows
        self._probes = Probes()
        self._there: dict[str, frozenset[str]] = {}  # by host, as far as they answered

    def seen(self, host: str, used: Collection[str]) -> list[str]:
        """All that are pools now: those `used` at present, then those of before that exist."""
        known = {row.path for row in self._rows.values() if row.host == host}
        unused = known - set(used)
        there = self._existing(host, unused)
        self._remember(host, known, unused - there, [one for one in used if one not in known])
        return [*used, *sorted(there)]

    def _existing(self, host: str, paths: set[str]) -> frozenset[str]:
        """Which of them exist; where there is no answer, what was so before."""
        if not paths:
            return frozenset()

        def look() -> frozenset[str]:
            return frozenset(path for path in paths if os.path.isdir(path))

        try:
            self._there[host] = self._probes.ask(host, look, LOOK_TIMEOUT_S)
        except TimeoutError as error:
            log.warning("directories_not_seen", extra={"host": host, "why": str(error)})
        return self._there.get(host, frozenset()) & paths

    def _remember(self, host: str, known: set[str], absent: set[str], new: list[str]) -> None:
        """Durable. When there is no room for more, those that don't exist are forgotten first."""
        gone = absent if new and len(known) + len(new) > MOST_DIRECTORIES else set[str]()
        if gone:
            self._rows.delete(*(directory_uuid(host, path) for path in gone))
        room = max(MOST_DIRECTORIES - len(known - gone), 0)
        if new[:room]:
            self._rows.put_all(
                Directory(uuid=directory_uuid(host, path), host=host, path=path)
                for path in new[:room]
            )
