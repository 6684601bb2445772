"""Where things lie in a domain's directory on the point, and its files as the fold's contents."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence

from storage.errors import Damaged, FileDamaged, FileGone, translated
from storage.files.fs import Fs
from storage.format.manifests import ManifestReader
from storage.format.packs import PackEntry, read_footer


class DomainPaths:
    """Absolute paths of one domain. A FileId (`session/n`) is a path below packs/ or manifests/."""

    def __init__(self, point: str, cluster_uuid: str) -> None:
        self._point = point
        self.root = os.path.join(point, "domains", cluster_uuid)
        self.label = os.path.join(self.root, "DOMAIN")
        self.log = os.path.join(self.root, "log")
        self.packs = os.path.join(self.root, "packs")
        self.manifests = os.path.join(self.root, "manifests")
        self.checkpoints = os.path.join(self.root, "checkpoints")
        self.hosts = os.path.join(self.root, "hosts")
        self.tmp = os.path.join(self.root, "tmp")
        self.views = os.path.join(self.root, "views")
        self.ballast = os.path.join(self.root, "ballast")

    def sibling(self, cluster_uuid: str) -> DomainPaths:
        """Another cluster's domain on the same point."""
        return DomainPaths(self._point, cluster_uuid)

    def pack(self, pack: str) -> str:
        return os.path.join(self.packs, pack)

    def manifest(self, manifest: str) -> str:
        return os.path.join(self.manifests, manifest)

    def host_tmp(self, host: str) -> str:
        """Where a host writes its records before they get their numbers."""
        return os.path.join(self.tmp, f"host-{host}")

    def directories(self) -> tuple[str, ...]:
        """All that a new domain starts with."""
        return (
            self.log,
            self.packs,
            self.manifests,
            self.checkpoints,
            self.hosts,
            self.tmp,
            self.views,
        )


class FileContents:
    """storage.view.index.Contents read from the point."""

    def __init__(self, fs: Fs, paths: DomainPaths) -> None:
        self._fs = fs
        self._paths = paths

    def footer(self, pack: str, digest: bytes) -> Sequence[PackEntry]:
        path = self._paths.pack(pack)
        with translated(path), _gone(path):
            seal, entries = read_footer(self._fs, path)
        _require_digest(path, seal.digest, digest)
        return entries

    def pages(self, manifest: str, digest: bytes) -> Iterator[tuple[int, bytes]]:
        path = self._paths.manifest(manifest)
        with translated(path), _gone(path), ManifestReader(self._fs, path) as reader:
            _require_digest(path, reader.seal.digest, digest)
            yield from reader.pages()


@contextlib.contextmanager
def _gone(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        raise FileGone(f"{path} is not there") from error
    except Damaged as error:
        raise FileDamaged(str(error)) from error


def _require_digest(path: str, found: bytes, wanted: bytes) -> None:
    if found != wanted:
        raise FileDamaged(f"{path}: is whole, but is not the file that the log names")
