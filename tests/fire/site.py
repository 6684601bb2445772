"""A domain under fire: what was acknowledged, and the promise that all of it is still there."""

from __future__ import annotations

import random
from pathlib import Path

from storage.check.check import CheckReport, check_point
from storage.domain.domain import Domain
from storage.files.fs import Fs, OsFs
from storage.point import ClusterLabel, Point
from tests.store import CHUNK, PACK, Saved, cluster, load, save

HOST = "host-1"


class Site:
    """A point in `place`, one cluster's domain on it, and the host's memory of it in `memory`."""

    def __init__(
        self, place: Path, memory: Path, fs: Fs | None = None, *, found: ClusterLabel | None = None
    ) -> None:
        """Made anew, unless there is one already, of the cluster `found`."""
        self.path = place / "point"
        self.memory = memory
        self.label: ClusterLabel = found or cluster("c")
        self.truth: dict[Saved, bytes] = {}
        if found is None:
            self.path.mkdir()
            Point.create(str(self.path), "p", chunk_size=CHUNK, fs=fs).close()
        self.domain = self.opened(fs)

    def opened(self, fs: Fs | None = None) -> Domain:
        point = Point.open(str(self.path), fs=fs)
        return point.domain(
            self.label,
            HOST,
            str(self.memory / "views"),
            pack_size_bytes=PACK,
            seen_path=str(self.memory / "seen"),
        )

    def reopen(self) -> None:
        self.domain.close()
        self.domain = self.opened()

    def save(self, image: bytes, parent: Saved | None = None) -> Saved:
        saved = save(self.domain, image, parent)
        self.truth[saved] = image
        return saved

    def forget(self, saved: Saved) -> None:
        self.domain.forget([saved.backup])
        del self.truth[saved]

    def require_truth(self) -> None:
        """Exactly what was acknowledged is there, and restores bit for bit."""
        listed = {row.backup for row in self.domain.backups()}
        assert listed == {saved.backup for saved in self.truth}
        for saved, image in self.truth.items():
            assert load(self.domain, saved) == image, saved

    def check(self) -> CheckReport:
        """The offline checker's report, which must be clean."""
        report = check_point(str(self.path), deep=True, fs=OsFs())
        assert report.clean, report.findings
        return report


def noise(chunks: int, seed: int) -> bytes:
    """An image that neither dedups nor compresses."""
    return random.Random(seed).randbytes(chunks * CHUNK)


def changed(image: bytes, chunks: int, seed: int) -> bytes:
    """`image` with that many of its chunks, from a random one on, written anew."""
    start = random.Random(seed).randrange(len(image) // CHUNK - chunks + 1) * CHUNK
    return image[:start] + noise(chunks, seed) + image[start + chunks * CHUNK :]
