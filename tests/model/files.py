"""The model's disk: a set of small sealed files, each one bit of an integer.

A file is its name and what it holds; the digest that records carry stands for both. Linking a pack
into another domain keeps its digest, as a hard link does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from blake3 import blake3

from storage.errors import Damaged, FileGone
from storage.format.chunks import CODEC_PATCH, CODEC_RAW
from storage.format.packs import PackEntry
from storage.format.record import FileSeal, file_id

STORED_BYTES = 1 << 20
HEADER_BYTES = 64
FRAME_BYTES = STORED_BYTES + 56
CHUNK_BYTES = 1 << 20

Pages: TypeAlias = tuple[tuple[int, bytes], ...]


class File(NamedTuple):
    """`chunks` of a pack, each its id and, for a patch, its base's; or `pages` of a manifest. `bit`
    is its place in a disk's integer."""

    domain: int
    kind: str  # "packs" or "manifests"
    session: str
    seal: FileSeal
    bit: int
    name_bit: int
    chunks: tuple[bytes, ...] = ()
    pages: Pages = ()

    @property
    def name(self) -> str:
        return file_id(self.session, self.seal.n)


class Files:
    """Every file that any explored state has seen."""

    def __init__(self) -> None:
        self._all: dict[tuple[int, str, str, bytes], File] = {}
        self._names: dict[tuple[int, str, str], int] = {}
        self._by_bit: list[File] = []
        self.domains: dict[int, int] = {}  # domain -> mask of its files

    def pack(self, domain: int, session: str, n: int, chunks: tuple[bytes, ...]) -> File:
        size_bytes = HEADER_BYTES + len(chunks) * (FRAME_BYTES + 56) + 48
        digest = _digest("packs", session, n, chunks)
        seal = FileSeal(n=n, size_bytes=size_bytes, count=len(chunks), digest=digest)
        return self._add(domain, "packs", session, seal, chunks, ())

    def manifest(self, domain: int, session: str, n: int, pages: Pages) -> File:
        digest = _digest("manifests", session, n, [page for _, page in pages])
        seal = FileSeal(n=n, size_bytes=200, count=len(pages), digest=digest)
        return self._add(domain, "manifests", session, seal, (), pages)

    def link(self, source: File, domain: int, session: str, n: int) -> File:
        """A second name of a pack, in another domain."""
        seal = FileSeal(
            n=n,
            size_bytes=source.seal.size_bytes,
            count=source.seal.count,
            digest=source.seal.digest,
        )
        return self._add(domain, "packs", session, seal, source.chunks, ())

    def _add(
        self,
        domain: int,
        kind: str,
        session: str,
        seal: FileSeal,
        chunks: tuple[bytes, ...],
        pages: Pages,
    ) -> File:
        name = file_id(session, seal.n)
        known = self._all.get((domain, kind, name, seal.digest))
        if known is None:
            name_bit = 1 << self._names.setdefault((domain, kind, name), len(self._names))
            bit = 1 << len(self._by_bit)
            known = File(domain, kind, session, seal, bit, name_bit, chunks, pages)
            self._all[domain, kind, name, seal.digest] = known
            self._by_bit.append(known)
            self.domains[domain] = self.domains.get(domain, 0) | bit
        return known

    def find(self, domain: int, kind: str, name: str, digest: bytes) -> File:
        try:
            return self._all[domain, kind, name, digest]
        except KeyError:
            raise Damaged(f"{kind}/{name}: no such file was ever written") from None

    def of(self, mask: int) -> Iterator[File]:
        """The files whose bits are set."""
        while mask:
            low = mask & -mask
            yield self._by_bit[low.bit_length() - 1]
            mask ^= low

    def of_session(self, domain: int, session: str, disk: int) -> int:
        """Mask of a session's files on a disk."""
        mask = disk & self.domains.get(domain, 0)
        return sum(file.bit for file in self.of(mask) if file.session == session)


def _digest(kind: str, session: str, n: int, parts: Sequence[bytes]) -> bytes:
    return blake3(f"{kind} {session} {n} ".encode() + b"".join(parts)).digest(16)


class DiskContents:
    """storage.view.index.Contents over the files of one domain, all of them or those on a disk."""

    def __init__(self, files: Files, domain: int, disk: int = -1) -> None:
        self._files = files
        self._domain = domain
        self._disk = disk

    def _file(self, kind: str, name: str, digest: bytes) -> File:
        file = self._files.find(self._domain, kind, name, digest)
        if not file.bit & self._disk:
            raise FileGone(f"{kind}/{name} is not there")
        return file

    def footer(self, pack: str, digest: bytes) -> Sequence[PackEntry]:
        chunks = self._file("packs", pack, digest).chunks
        return [
            PackEntry(
                HEADER_BYTES + k * FRAME_BYTES,
                CHUNK_BYTES,
                STORED_BYTES,
                CODEC_PATCH if chunk[32:] else CODEC_RAW,
                0,
                chunk[:32],
                0,
                chunk[32:],
            )
            for k, chunk in enumerate(chunks)
        ]

    def pages(self, manifest: str, digest: bytes) -> Iterator[tuple[int, bytes]]:
        yield from self._file("manifests", manifest, digest).pages
