"""A domain that is written file by file, with digests that are right, whatever it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from storage.format.record import (
    FIRST_PREVIOUS,
    BackupSeal,
    Commit,
    DiskSeal,
    FileSeal,
    Op,
    Open,
    Record,
    record_digest,
)
from storage.log.log import record_path
from storage.point import ClusterLabel
from tests import forging
from tests.store import new_uuid

S = "ab" * 16
HUGE = 1 << 61


class Forger:
    """A domain that is written file by file."""

    def __init__(self, point: Path, name: str = "evil") -> None:
        self.label = ClusterLabel(cluster_uuid=new_uuid(), cluster_name=name)
        self.root = point / "domains" / self.label.cluster_uuid
        for directory in ("log/00000000", "packs", "manifests", "checkpoints", "hosts", "tmp"):
            (self.root / directory).mkdir(parents=True)
        body = msgspec.msgpack.encode(self.label)
        (self.root / "DOMAIN").write_bytes(forging.small_object(b"VKDO", body))
        self._seq = 0
        self._previous = FIRST_PREVIOUS

    @property
    def uuid(self) -> str:
        return self.label.cluster_uuid

    def append(self, *ops: Op) -> None:
        record = Record(
            seq=self._seq + 1, previous=self._previous, nonce=bytes(16), host="h", ops=tuple(ops)
        )
        self.append_body(msgspec.msgpack.encode(record))

    def append_body(self, body: bytes) -> None:
        self._seq += 1
        content = forging.small_object(b"VKRE", body)
        (self.root / "log" / record_path(self._seq)).write_bytes(content)
        self._previous = record_digest(content)

    def manifest(
        self, pages: Sequence[tuple[int, bytes]], capacity: int, kind: int = 0
    ) -> FileSeal:
        items, rows = b"", []
        for page_no, page in pages:
            rows.append(forging.page_row(page_no, len(page) // 34, 64 + len(items), page))
            items += page
        content = forging.manifest(items, rows, capacity, kind).encoded()
        return self._put("manifests", 0, content, len(rows))

    def pack(self, items: bytes, rows: Sequence[bytes], maker: str = "") -> FileSeal:
        """`maker`: the FileId that its header says."""
        sealed = forging.pack(items, rows)
        if maker:
            session, _, n = maker.partition("/")
            sealed = sealed.but(session=bytes.fromhex(session), n=int(n, 16))
        return self._put("packs", 0, sealed.encoded(), len(rows))

    def _put(self, root: str, n: int, content: bytes, count: int) -> FileSeal:
        path = self.root / root / S / f"{n:08x}"
        path.parent.mkdir()
        path.write_bytes(content)
        return FileSeal(n=n, size_bytes=len(content), count=count, digest=content[-32:-16])

    def commit(
        self,
        manifest: FileSeal,
        packs: tuple[FileSeal, ...] = (),
        capacity: int = HUGE,
        label: bytes = b"",
    ) -> str:
        """OPEN and COMMIT of one backup of one disk; its uuid."""
        backup = new_uuid()
        disk = DiskSeal(disk=new_uuid(), capacity=capacity, manifest=manifest.n)
        seal = BackupSeal(backup=backup, label=label, disks=(disk,))
        self.append(opened(S))
        self.append(Commit(session=S, packs=packs, manifests=(manifest,), backups=(seal,)))
        return backup


def opened(session: str, *holds: str) -> Open:
    return Open(session=session, kind="backup", host="h", incarnation="i", holds=holds)
