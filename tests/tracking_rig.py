"""A rig whose backups track changes by baselines, and the ways a volume's blocks get about."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import subprocess
from pathlib import Path

from engine.model import Baseline
from engine.snapshot.baselines import Baselines
from engine.snapshot.tracking import Tracker
from engine.state import State
from tests.rig import Made, Rig

CHUNK = 64 << 10
VM = "6b6f1f0e-1f6c-4b52-9a53-5bde4a1c2a01"

_FICLONERANGE = 0x4020940D
_libc = ctypes.CDLL(None, use_errno=True)
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10


class TrackedRig(Rig):
    """Backs up `volume`, one disk named vda, each time on top of the last."""

    def __init__(self, root: Path, pool: Path) -> None:
        super().__init__(root, pool, chunk_size=CHUNK)
        self.volume = pool / "v"
        self.state = State(str(root / "state"))
        self.baselines = Baselines(self.state, lambda: 1.0)
        self.tracker_of = lambda backup: Tracker(self.baselines, VM, backup)
        self.last: Made | None = None

    def next(self) -> Made:
        """A backup on top of the last one."""
        made = self.back_up(self.volume, parent=self.last)
        self.last = made
        return made

    def row(self) -> Baseline:
        row = self.baselines.find(VM, "vda")
        assert row is not None
        return row

    def restored(self) -> bytes:
        """The content of the last backup."""
        assert self.last is not None
        path = self.restore(self.last)
        content = path.read_bytes()
        path.unlink()
        return content


def notes(made: Made) -> str:
    assert made.result is not None
    return "; ".join(made.result.facts.notes)


def write_unsynced(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        file.write(content)


def fallocate(path: Path, mode: int, offset: int, length: int) -> None:
    """fallocate(2); raises OSError."""
    with path.open("r+b") as file:
        place = ctypes.c_int64(offset), ctypes.c_int64(length)
        if _libc.fallocate(file.fileno(), mode, *place) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))


def clone_range(source: Path, offset: int, length: int, target: Path, to: int) -> None:
    """FICLONERANGE: `target` shares blocks of `source`. Raises OSError."""
    with source.open("rb") as old, target.open("r+b") as new:
        argument = struct.pack("=qQQQ", old.fileno(), offset, length, to)
        fcntl.ioctl(new.fileno(), _FICLONERANGE, argument)


def run(*argv: object) -> None:
    subprocess.run([str(one) for one in argv], check=True, capture_output=True)
