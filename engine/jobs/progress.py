"""Counting what a job has done, and judging how fast it goes.

The counters are absolute; the rate is a moving average over steps of at least `STEP_S`, so that it
neither jumps with every batch nor remembers an hour ago. All in bytes and seconds of a monotonic
clock. Not locked: JobContext does that.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.model import Progress

STEP_S = 1.0
_NEWEST_SHARE = 0.4  # of the newest step in the average: three steps make most of it


@dataclass(slots=True)
class Counters:
    """What has been done so far. `done` is what the rate and the ETA are about."""

    total: int = 0
    scanned: int = 0
    read: int = 0
    changed: int = 0
    stored: int = 0
    restored: int = 0

    @property
    def done(self) -> int:
        return max(self.scanned, self.restored)


class Speedometer:
    """Bytes a second, from (time, bytes done) readings."""

    def __init__(self, now_s: float) -> None:
        self._began_s = now_s
        self._step_began_s = now_s
        self._step_began_bytes = 0
        self._rate = 0.0

    def reading(self, now_s: float, done_bytes: int) -> float:
        """The present rate; before the first step is over, the mean since the start."""
        step_s = now_s - self._step_began_s
        if step_s >= STEP_S:
            newest = max(done_bytes - self._step_began_bytes, 0) / step_s
            first = self._step_began_s == self._began_s
            self._rate = newest if first else self._rate + _NEWEST_SHARE * (newest - self._rate)
            self._step_began_s = now_s
            self._step_began_bytes = done_bytes
        elif self._step_began_s == self._began_s:
            return self.mean(now_s, done_bytes)
        return self._rate

    def mean(self, now_s: float, done_bytes: int) -> float:
        """The rate over the whole time."""
        elapsed_s = now_s - self._began_s
        return done_bytes / elapsed_s if elapsed_s > 0 else 0.0


def to_progress(counters: Counters, rate: float) -> Progress:
    """The row for `counters`. The ETA is unknown (-1) as long as the total or the rate is."""
    left = max(counters.total - counters.done, 0)
    known = counters.total > 0 and (rate > 0 or left == 0)
    return Progress(
        bytes_total=counters.total,
        bytes_scanned=counters.scanned,
        bytes_read=counters.read,
        bytes_changed=counters.changed,
        bytes_stored=counters.stored,
        bytes_restored=counters.restored,
        rate=rate,
        eta_s=(left / rate if left else 0.0) if known else -1.0,
    )
