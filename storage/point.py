"""A backup point: making one, opening one, and the domains on it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import threading
import uuid
from collections.abc import Callable
from typing import Annotated

import msgspec

from storage.domain import imports
from storage.domain.domain import Domain
from storage.errors import (
    Damaged,
    PointNewerFormat,
    PointNotEmpty,
    PointUnreachable,
    Refused,
    StorageError,
    translated,
)
from storage.files.fs import Fs, OsFs, Room
from storage.files.mounts import MountKind
from storage.files.publish import discard, make_dirs, put_if_absent
from storage.format.chunks import MAX_CHUNK_BYTES, MIN_CHUNK_BYTES, ChunkHasher, is_chunk_size
from storage.format.framing import decode_body, decode_object, encode_object
from storage.format.paths import DomainPaths
from storage.format.record import Digest32, Uuid
from storage.log.rebuild import Host, open_view
from storage.log.seen import Seen
from storage.view import memory_tables
from storage.view.listing import BackupRow
from storage.view.memory_tables import BoundedTables

POINT_MAGIC = b"VKPO"
DOMAIN_MAGIC = b"VKDO"
LABEL_LIMIT_BYTES = 64 << 10
DEFAULT_CHUNK_BYTES = 1 << 20
DEFAULT_PACK_BYTES = 64 << 20

_FILE_LIMIT_BYTES = LABEL_LIMIT_BYTES + 64
_NOT_CONTENT = frozenset({"lost+found"})
_UNFINISHED = re.compile("POINT-[0-9a-f]{16}")
_Name = Annotated[str, msgspec.Meta(max_length=4096)]


class PointLabel(msgspec.Struct, frozen=True, kw_only=True):
    """The POINT file."""

    uuid: Uuid
    name: _Name
    chunk_size: Annotated[int, msgspec.Meta(ge=MIN_CHUNK_BYTES, le=MAX_CHUNK_BYTES)]
    key: Digest32


class ClusterLabel(msgspec.Struct, frozen=True, kw_only=True):
    """The DOMAIN file: whose domain it is."""

    cluster_uuid: Uuid
    cluster_name: _Name
    cluster_mode: _Name = ""


log = logging.getLogger(__name__)

_point_decoder = msgspec.msgpack.Decoder(PointLabel)
_cluster_decoder = msgspec.msgpack.Decoder(ClusterLabel)
_encoder = msgspec.msgpack.Encoder()


class Point:
    """An opened point. Thread-safe; holds no file open."""

    def __init__(self, fs: Fs, path: str, label: PointLabel, kind: MountKind) -> None:
        self._fs = fs
        self._foreign: dict[str, BoundedTables] = {}  # the one that was asked for last at the end
        self._lock = threading.Lock()
        self.path = path
        self.kind = kind
        self.uuid = label.uuid
        self.name = label.name
        self.chunk_size = label.chunk_size
        self.hasher = ChunkHasher(label.key)

    @classmethod
    def create(
        cls,
        path: str,
        name: str,
        *,
        chunk_size: int = DEFAULT_CHUNK_BYTES,
        fs: Fs | None = None,
    ) -> Point:
        """Makes an empty, existing directory a point. Durable on return.

        PointNotEmpty when it holds anything, PointUnsafeMount, PointReadOnly, PointFull,
        PointUnreachable when it is not there.
        """
        fs = fs or OsFs()
        if not is_chunk_size(chunk_size):
            raise Refused(f"chunk size {chunk_size}: a power of two from 64 KiB to 4 MiB")
        _mount_kind(fs, path)
        label = PointLabel(
            uuid=str(uuid.uuid4()),
            name=name,
            chunk_size=chunk_size,
            key=secrets.token_bytes(32),
        )
        with translated(path):
            content = set(fs.listdir(path)) - _NOT_CONTENT
            unfinished = {name for name in content if _UNFINISHED.fullmatch(name)}
            content -= unfinished
            if content:
                raise PointNotEmpty(f"{path} holds {sorted(content)[0]!r}, but no POINT")
            body = encode_object(POINT_MAGIC, _encoder.encode(label))
            tmp = os.path.join(path, f"POINT-{secrets.token_hex(8)}")
            try:
                put_if_absent(fs, tmp, os.path.join(path, "POINT"), body)
            except FileExistsError as error:
                raise PointNotEmpty(f"{path}: somebody else made it a point just now") from error
            except OSError:
                _take_back(fs, path, label.uuid)
                raise
            # Of attempts that a crash ended. Whoever is at it now has lost to our POINT.
            for name in unfinished:
                discard(fs, os.path.join(path, name))
            make_dirs(fs, os.path.join(path, "domains"), path)
        return cls.open(path, expect_uuid=label.uuid, fs=fs)

    @classmethod
    def open(cls, path: str, *, expect_uuid: str = "", fs: Fs | None = None) -> Point:
        """PointUnreachable when there is no POINT, or another one than expected; PointUnsafeMount;
        PointNewerFormat; Damaged."""
        fs = fs or OsFs()
        kind = _mount_kind(fs, path)
        label = _point_label(_read_small(fs, os.path.join(path, "POINT"), POINT_MAGIC), path)
        if expect_uuid and label.uuid != expect_uuid:
            raise PointUnreachable(f"{path} holds point {label.uuid}, expected {expect_uuid}")
        return cls(fs, path, label, kind)

    def room(self) -> Room:
        """Size of its file system and what is free there."""
        with translated(self.path):
            return self._fs.room(self.path)

    def clusters(
        self, unread: Callable[[str, StorageError], None] = lambda _name, _error: None
    ) -> list[ClusterLabel]:
        """Every cluster that has a domain here, by uuid, but for those with an unreadable label:
        `unread` is told these."""
        root = os.path.join(self.path, "domains")
        with translated(root):
            names = self._fs.listdir(root)
        found = []
        for name in names:
            try:
                found.append(self.cluster(name))
            except StorageError as error:
                # Anybody's domain: it must not hide the others.
                log.warning(
                    "domain_unreadable",
                    extra={"path": os.path.join(root, name), "error": str(error)},
                )
                unread(name, error)
        return [label for label in found if label is not None]

    def cluster(self, name: str) -> ClusterLabel | None:
        """The label of the domain of that uuid; None for what is not (yet) one. Damaged."""
        paths = DomainPaths(self.path, name)
        path = paths.label
        try:
            with translated(path):
                if self._fs.stat(paths.root).kind != "directory":
                    return None
                self._fs.stat(path)
        except PointUnreachable:
            return None
        return _cluster_label(_read_small(self._fs, path, DOMAIN_MAGIC), path, name)

    def domain(
        self,
        label: ClusterLabel,
        host: str,
        view_dir: str,
        *,
        pack_size_bytes: int = DEFAULT_PACK_BYTES,
        seen_path: str = "",
    ) -> Domain:
        """Opens one's own domain for writing; makes it when it is not there.

        `host` is this data directory's id; one process at a time may use it. `view_dir` takes the
        view when the point is on NFS. `seen_path` is a file of the host's, off the point, by which
        an older copy of the point is told (storage.log.seen); "" for none. Folds the log, aborts
        what this host left open, clears its files. May take long after the view was lost. Raises
        StorageErrors; nothing is half open.
        """
        paths = DomainPaths(self.path, label.cluster_uuid)
        self._require_known_format(label.cluster_uuid)
        self._make_domain(paths, label)
        views = paths.views if self.kind == "local" else view_dir
        with translated(views):
            os.makedirs(views, mode=0o700, exist_ok=True)
        identity = f"{self.uuid} {label.cluster_uuid}".encode()
        seen = Seen(seen_path)
        us = Host(host, seen.number)
        with translated(views):
            view = open_view(self._fs, paths, os.path.join(views, host), identity, us)
        domain = Domain(
            self._fs,
            paths,
            view,
            host=host,
            hasher=self.hasher,
            chunk_size=self.chunk_size,
            pack_size_bytes=pack_size_bytes,
            seen=seen,
        )
        try:
            domain.require_own_past()
            domain.require_no_gap()
            domain.clear_dead_sessions()
            domain.ballast.keep()
            seen.make_durable()
        except BaseException:
            domain.close()
            raise
        return domain

    def _require_known_format(self, name: str) -> None:
        """PointNewerFormat for a label of a newer format. What else is wrong with it is in nobody's
        way, and named by the check."""
        try:
            self.cluster(name)
        except PointNewerFormat:
            raise
        except StorageError as error:
            log.warning("label_unreadable", extra={"domain": name, "error": str(error)})

    def _make_domain(self, paths: DomainPaths, label: ClusterLabel) -> None:
        with translated(paths.root):
            for directory in paths.directories():
                make_dirs(self._fs, directory, self.path)
            body = encode_object(DOMAIN_MAGIC, _encoder.encode(label))
            tmp = os.path.join(paths.tmp, f"DOMAIN-{secrets.token_hex(8)}")
            try:
                self._fs.stat(paths.label)
            except FileNotFoundError:
                try:
                    put_if_absent(self._fs, tmp, paths.label, body)
                except FileExistsError:
                    self._fs.stat(paths.label)  # another host of the cluster made it just now

    def foreign_backups(self, cluster_uuid: str) -> list[BackupRow]:
        """The live backups of any domain, read from its log; nothing there is changed.

        What was read is remembered, so the next call reads only what came since; of many domains
        only those that were asked for last. PointUnreachable when there is no such domain.
        """
        paths = DomainPaths(self.path, cluster_uuid)
        with self._lock:
            # One that fails half way is not to be gone on from.
            known = self._foreign.pop(cluster_uuid, None)
            found = imports.read_domain(self._fs, paths, known)
            self._foreign[cluster_uuid] = found.state
            self._forget_foreign()
            return found.backups()

    def _forget_foreign(self) -> None:
        """All together may take up what one alone may: anybody may make any number of domains."""
        size_bytes = sum(state.size_bytes for state in self._foreign.values())
        while size_bytes > memory_tables.FOREIGN_BYTES_LIMIT:
            size_bytes -= self._foreign.pop(next(iter(self._foreign))).size_bytes

    def close(self) -> None:
        """Forgets what was read of other domains."""
        self._foreign.clear()


def is_point(path: str) -> bool:
    """Whether the directory has a POINT file, of whatever version."""
    return os.path.lexists(os.path.join(path, "POINT"))


def _take_back(fs: Fs, path: str, point_uuid: str) -> None:
    """A POINT that may not be durable must not be found by the next attempt."""
    name = os.path.join(path, "POINT")
    with contextlib.suppress(StorageError, OSError):
        if _point_label(_read_small(fs, name, POINT_MAGIC), path).uuid == point_uuid:
            fs.unlink(name)


def _mount_kind(fs: Fs, path: str) -> MountKind:
    with translated(path):
        return fs.mount_kind(path)


def _read_small(fs: Fs, path: str, magic: bytes) -> bytes:
    with translated(path):
        fd = fs.open_read(path)
        try:
            found = fs.pread(fd, _FILE_LIMIT_BYTES, 0)
        finally:
            fs.close(fd)
    return decode_object(magic, found, LABEL_LIMIT_BYTES, path)


def _point_label(body: bytes, path: str) -> PointLabel:
    label = decode_body(_point_decoder, body, f"{path}: POINT")
    if not is_chunk_size(label.chunk_size):
        raise Damaged(f"{path}: POINT: chunk size {label.chunk_size}")
    return label


def _cluster_label(body: bytes, path: str, name: str) -> ClusterLabel:
    label = decode_body(_cluster_decoder, body, path)
    if label.cluster_uuid != name:
        raise Damaged(f"{path}: names cluster {label.cluster_uuid}")
    return label
