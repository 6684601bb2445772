"""How much room baselines take up: what VMs have overwritten since, and would be free without them.

That is read from the extents of each baseline, some microseconds an extent; so it is looked at in
the rounds of engine/snapshot/baseline_tending.py, each baseline only so often that it takes a
hundredth of the time, and kept in memory for whoever asks.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from engine.model import Baseline
from engine.probes import Probes
from engine.snapshot.extents import MapUnclear, unshared_bytes

log = logging.getLogger(__name__)

LOOK_TIMEOUT_S = 5.0
_REST_SHARE = 100  # times as long as the look took


@dataclass(frozen=True, slots=True)
class _Seen:
    size_bytes: int
    next_look_s: float


class Pinned:
    """Thread-safe. Baselines are named by their files."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, _Seen] = {}

    def bytes_of(self, row: Baseline) -> int:
        """As last seen; 0 for what was not looked at yet, and where there is no baseline."""
        with self._lock:
            seen = self._seen.get(row.file)
        return seen.size_bytes if seen else 0

    def look(self, rows: Iterable[Baseline], probes: Probes) -> None:
        """Looks at those whose turn it is, and forgets all that are none of `rows`.

        Of a pool that hangs one baseline is asked for, not all.
        """
        here = {row.file: row for row in rows if row.file}
        with self._lock:
            self._seen = {file: seen for file, seen in self._seen.items() if file in here}
            rested = {f: seen.next_look_s for f, seen in self._seen.items()}
        hung: set[str] = set()
        for file, row in here.items():
            began_s = self._clock()
            if began_s < rested.get(file, began_s) or os.path.dirname(file) in hung:
                continue
            try:
                size_bytes = probes.ask(
                    f"pinned {file}", partial(pinned_bytes, row), LOOK_TIMEOUT_S
                )
            except TimeoutError as error:
                log.info("pinned_unknown", extra={"file": file, "why": str(error)})
                hung.add(os.path.dirname(file))
                continue
            now_s = self._clock()
            with self._lock:
                self._seen[file] = _Seen(size_bytes, now_s + _REST_SHARE * (now_s - began_s))


def pinned_bytes(row: Baseline) -> int:
    """How much room the baseline takes up that would be free without it; 0 if it can't be told."""
    try:
        fd = os.open(row.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return unshared_bytes(fd)
        finally:
            os.close(fd)
    except (OSError, MapUnclear):
        return 0
