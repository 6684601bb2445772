"""What a check says, and how it is watched, held back and gone on with. See storage.check.check."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from storage.errors import shown
from storage.format.ranges import joined

SHOWN_RANGES = 100
MOST_FINDINGS = 10_000
NEWER = "newer"
_HARMLESS = frozenset({"orphan", "checkpoint", "bundle", "heartbeat"})
_NAP_S = 0.1


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it must be. `backups`: uuids of all that may lose data by it, as
    they are made on top of it; which of them do, and where, is in the report's `disks`."""

    kind: str  # "log", "label", "pack", "manifest", "chunk", "view", NEWER; or a harmless one
    path: str
    detail: str
    offset: int = -1
    backups: tuple[str, ...] = ()

    @property
    def harmless(self) -> bool:
        """Costs room, or time, not data."""
        return self.kind in _HARMLESS


@dataclass(frozen=True, slots=True)
class DiskDamage:
    """What of a disk backup can't be restored. `ranges`: (offset, length), the first of them."""

    backup: str
    disk: str
    capacity: int
    size_bytes: int
    range_count: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class CheckReport:
    """What was looked at, and what was found wrong. `more`: findings that are not listed."""

    findings: list[Finding] = field(default_factory=list)
    more: int = 0
    disks: list[DiskDamage] = field(default_factory=list)
    domains: int = 0
    records: int = 0
    backups: int = 0
    packs: int = 0
    packs_skipped: int = 0
    manifests: int = 0
    chunks: int = 0
    bytes_read: int = 0

    @property
    def clean(self) -> bool:
        """Whether no data is lost or in doubt; of what is `unread` nothing is known."""
        return not self.more and all(one.harmless or one.kind == NEWER for one in self.findings)

    @property
    def unread(self) -> list[Finding]:
        """The domains, by path, that only a newer vmkeep can check as a whole."""
        return [one for one in self.findings if one.kind == NEWER]

    def add(self, finding: Finding) -> None:
        """Lists the finding, while there is room; else counts it."""
        if len(self.findings) < MOST_FINDINGS:
            path, detail = shown(finding.path), shown(finding.detail)
            self.findings.append(replace(finding, path=path, detail=detail))
        else:
            self.more += 1


class Cancelled(Exception):
    """`cancelled` said so."""


class Reads(Protocol):
    """What a deep check knows of earlier ones. A pack is named `<cluster uuid>/<FileId>`."""

    def last(self, pack: str, /) -> float | None:
        """When it was last read whole and sound, the smaller the longer ago; None: never."""
        ...

    def skip(self, pack: str, /) -> bool:
        """Whether the check that this one goes on with has read it."""
        ...

    def done(self, pack: str, /) -> None:
        """It was read, and is sound."""
        ...


class NoReads:
    def last(self, _pack: str, /) -> float | None:
        return None

    def skip(self, _pack: str, /) -> bool:
        return False

    def done(self, _pack: str, /) -> None:
        return None


class Damage(NamedTuple):
    """For whoever can mend it: a pack (all of it, or one chunk there), or a manifest."""

    cluster: str
    pack: str = ""
    chunk: bytes = b""
    manifest: str = ""


@dataclass(slots=True)
class Watch:
    """How a check reports, is stopped and held back. on_progress(bytes done, bytes known of yet),
    of all domains."""

    cancelled: Callable[[], bool]
    on_progress: Callable[[int, int], None]
    on_damage: Callable[[Damage], None]
    reads: Reads
    rate_bytes_per_s: int
    free_at_s: float = 0.0
    done: int = 0
    total: int = 0

    def did(self, size_bytes: int) -> None:
        self.done += size_bytes
        self.on_progress(self.done, self.total)

    def pause(self, size_bytes: int = 0) -> None:
        """Raises Cancelled; waits until what was read is no more than the rate allows."""
        now_s = time.monotonic()
        if self.rate_bytes_per_s:
            self.free_at_s = max(self.free_at_s, now_s) + size_bytes / self.rate_bytes_per_s
        while not self.cancelled():
            wait_s = self.free_at_s - time.monotonic()
            if wait_s <= 0 or not self.rate_bytes_per_s:
                return
            time.sleep(min(wait_s, _NAP_S))
        raise Cancelled


class Pieces:
    """Ranges that come ascending: the first ones, and how many and how long all are."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, int]] = []
        self.count = 0
        self.size_bytes = 0
        self._end = -1

    def add(self, offset: int, size_bytes: int) -> None:
        self.size_bytes += size_bytes
        if offset != self._end:
            self.count += 1
        if self.count <= SHOWN_RANGES:
            self.shown[-1:] = joined([*self.shown[-1:], (offset, size_bytes)])
        self._end = offset + size_bytes
