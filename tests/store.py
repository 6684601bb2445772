"""A storage domain with backups of in-memory images: what storage's own tests work with."""

from __future__ import annotations

import contextlib
import os
import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.domain.domain import Domain
from storage.domain.reader import MAX_RUN_BYTES, plan_chunks, plan_reads
from storage.domain.session import NewBackup, Session
from storage.files.fs import Fs
from storage.format.chunks import ZERO_MARK, Encoder, Frame
from storage.format.patches import PatchEncoder
from storage.point import ClusterLabel, Point
from storage.view import tables
from storage.view.tables import unpack_chunk_row

CHUNK = 64 << 10
PACK = 1 << 20
PAGE_ENTRIES = 1024


@dataclass(frozen=True)
class Saved:
    """A backup that was acknowledged: its ids."""

    backup: str
    disk: str
    parent: str = ""


def new_uuid() -> str:
    return str(uuid.uuid4())


def cluster(name: str = "c") -> ClusterLabel:
    return ClusterLabel(cluster_uuid=new_uuid(), cluster_name=name)


def new_point(directory: Path, fs: Fs | None = None) -> Point:
    path = directory / "point"
    path.mkdir()
    return Point.create(str(path), "p", chunk_size=CHUNK, fs=fs)


def open_domain(point: Point, label: ClusterLabel, host: str = "host-1") -> Domain:
    return point.domain(label, host, os.path.join(point.path, "unused"), pack_size_bytes=PACK)


def changed_entries(
    session: Session, domain: Domain, image: bytes, page_no: int, parent: dict[int, bytes]
) -> dict[int, bytes]:
    """The page's entries that differ from the parent's; their chunks are stored."""
    encoder = Encoder()
    entries = {}
    first = page_no * PAGE_ENTRIES * CHUNK
    end = min(first + PAGE_ENTRIES * CHUNK, len(image))
    for at, start in enumerate(range(first, end, CHUNK)):
        chunk = image[start : start + CHUNK]
        if chunk == bytes(len(chunk)):
            if at in parent:
                entries[at] = ZERO_MARK
            continue
        chunk_id = domain.hasher.full(chunk)
        if parent.get(at) != chunk_id:
            entries[at] = chunk_id
            if not session.known([chunk_id])[0]:
                frame = _patch(session, domain, chunk_id, chunk, parent.get(at, b""))
                session.store([frame or encoder.encode(chunk_id, chunk)])
    return entries


def _patch(
    session: Session, domain: Domain, chunk_id: bytes, chunk: bytes, before: bytes
) -> Frame | None:
    """The chunk as a patch of what the parent has at this place, if that pays."""
    base = session.bases({chunk_id: before}).get(chunk_id) if before else None
    if base is None:
        return None
    content = read_chunk(domain, base.chunk_id)
    view = memoryview(chunk)
    return PatchEncoder().encode(chunk_id, view, base.chunk_id, content, base.stored_len)


def read_chunk(domain: Domain, chunk_id: bytes) -> bytes:
    """A chunk by its id; ChunkDamaged."""
    buffer = memoryview(bytearray(MAX_RUN_BYTES + CHUNK + 4096))
    with contextlib.closing(domain.reader()) as reader:
        (run,) = plan_chunks(domain, [chunk_id])
        ((_, content),) = reader.read(run, buffer)
        return bytes(content)


def edited(image: bytes, *blocks: int, seed: int = 1) -> bytes:
    """The image with other bytes at the start of some 4 KiB blocks."""
    changed = bytearray(image)
    for block in blocks:
        changed[block * 4096 : block * 4096 + 64] = random.Random(seed + block).randbytes(64)
    return bytes(changed)


def patches(domain: Domain) -> dict[bytes, bytes]:
    """The chunks that are placed as patches, and what they stand on."""
    with domain.view.read() as state:
        rows = {c: unpack_chunk_row(row) for c, row in state.table("chunks").scan()}
    return {chunk: row.base for chunk, row in rows.items() if row.base}


def write_disk(session: Session, domain: Domain, image: bytes, disk: str, parent: str) -> None:
    """Stores an image as a disk backup of the session, against a parent's disk or in full."""
    below = domain.disk_map(parent) if parent else None
    builder = session.manifest(disk, len(image), parent or None)
    for page_no in range(-(-len(image) // (CHUNK * PAGE_ENTRIES))):
        old = below.page(page_no) if below else {}
        builder.add_page(page_no, changed_entries(session, domain, image, page_no, old))


def save(domain: Domain, image: bytes, parent: Saved | None = None, label: bytes = b"") -> Saved:
    """One whole backup of one disk. Incremental when the parent's size is the image's."""
    if parent and domain.disk_map(parent.disk).capacity != len(image):
        parent = None
    saved = Saved(new_uuid(), new_uuid(), parent.backup if parent else "")
    with domain.begin("backup", [parent.backup] if parent else []) as session:
        write_disk(session, domain, image, saved.disk, parent.disk if parent else "")
        session.commit([NewBackup(saved.backup, label, [saved.disk], saved.parent)])
    return saved


def load(domain: Domain, saved: Saved, *, hold: bool = True) -> bytes:
    """A disk backup's content, read the way a restore does."""
    image_map = domain.disk_map(saved.disk)
    image = bytearray(image_map.capacity)
    buffer = memoryview(bytearray(MAX_RUN_BYTES + CHUNK + 4096))
    reader = domain.reader()
    with domain.begin("read", [saved.backup] if hold else []) as session:
        for run in plan_reads(domain, image_map):
            for place, raw in reader.read(run, buffer):
                for target in place.targets:
                    image[target * CHUNK : target * CHUNK + len(raw)] = raw
        session.end()
    reader.close()
    return bytes(image)


def dump(domain: Domain) -> dict[str, dict[bytes, bytes]]:
    """The whole view."""
    with domain.view.read() as state:
        return {name: dict(state.table(name).scan()) for name in tables.TABLE_NAMES}


def require_rebuilt_alike(domain: Domain) -> None:
    """The view is what log, footers and manifests say, byte for byte (I8)."""
    domain.refresh()
    before = dump(domain)
    domain.rebuild()
    assert dump(domain) == before, "the view is not what a rebuild makes"


def files(domain: Domain, *roots: str) -> set[str]:
    """Pack and manifest files on disk, as paths below the domain."""
    found = set()
    for root in roots or ("packs", "manifests"):
        for directory, _, names in os.walk(os.path.join(domain.paths.root, root)):
            for name in names:
                found.add(os.path.relpath(os.path.join(directory, name), domain.paths.root))
    return found


def live_files(domain: Domain) -> set[str]:
    """Those that the state names."""
    with domain.view.read() as state:
        return {f"packs/{name}" for name, _ in tables.packs.scan(state)} | {
            f"manifests/{name}" for name, _ in tables.manifests.scan(state)
        }


def image_of(*chunks: int | bytes) -> bytes:
    """An image of chunks: 0 is zeros, another number a chunk full of that byte."""
    parts: Sequence[bytes] = [
        chunk if isinstance(chunk, bytes) else bytes([chunk]) * CHUNK for chunk in chunks
    ]
    return b"".join(parts)


def mixed(count: int) -> list[bytes]:
    """That many random chunks."""
    return [os.urandom(CHUNK) for _ in range(count)]
