"""What a check in the VM works with: a directory of its own on NFS and one on a local disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import Config, Limits
from storage.check.check import check_point
from tests.engine_rig import EngineRig

KIB = 1 << 10
MIB = 1 << 20
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Site:
    """`point` is on NFS, `local` is not; both are empty directories."""

    point: Path
    local: Path
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Something measured, for the report."""
        self.notes.append(text)


class NfsRig(EngineRig):
    """An engine whose backups go to a point of kind `nfs`; its volumes are local."""

    def __init__(self, data: Path, point: Path, config: Config | None = None) -> None:
        limits = Limits(point_reserve_bytes=0)
        super().__init__(data, config or Config(limits=limits))
        try:
            self._point_uuid = self.engine.create_point("nfs", "nfs", str(point))
        except BaseException:
            self.engine.stop()
            raise

    @property
    def point_uuid(self) -> str:
        return self._point_uuid


def until(what: str, true: Callable[[], bool], patience_s: float = PATIENCE_S) -> float:
    """Waits for what somebody else does; how many seconds it took. Fails when it doesn't come."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < patience_s, f"never: {what}"
        time.sleep(0.05)
    return time.monotonic() - began


def clean(point: Path) -> None:
    """The deep check finds nothing, not even what only costs room."""
    found = check_point(str(point), deep=True).findings
    assert found == [], found


def pack_files(point: Path) -> list[Path]:
    """Packs on the point, with the names of those deleted while open."""
    return sorted(path for path in point.glob("domains/*/packs/*/*") if path.is_file())
