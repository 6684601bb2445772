"""Salvage: sealed packs of this host's interrupted backups, for the next backup to go on from.

Theory. A process that dies leaves its sessions open in the log and their sealed packs on the point.
The host's next start takes the packs of dead backup sessions over, in durable order: OPEN sessions
of its own · give the packs second names in them · ABORT the dead sessions · unlink their files. So
the dead session is fenced by the log like any other, nothing is held back for it, and the heartbeat
of the living host speaks for what was saved.

A session that looks up a chunk of a salvaged pack adopts the whole pack by another link, and
commits it as its own. A salvage session itself never commits. It is aborted when a session that
adopted most of it has committed, when a gc begins, and when the point runs out of room. Salvage
saves time only: any failure here means that a chunk is stored again.

Memory: ROW_BYTES a chunk, at most CHUNKS_LIMIT of them; read at the first lookup, not at the start.
Locks: `_lock` guards the members. It is never held while a record is appended.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from storage.domain import orphans
from storage.errors import PointFull, SessionEnded, StorageError, translated
from storage.files.publish import make_dirs
from storage.format.packs import read_footer
from storage.format.record import Open, file_id
from storage.log.fold import Garbage
from storage.view import tables

if TYPE_CHECKING:
    from storage.domain.domain import Domain

CHUNKS_LIMIT = 1 << 21
USED_UP_SHARE = 0.5
ROW_BYTES = 36

_BUCKETS = 1 << 14
_PACK_NAME = re.compile("[0-9a-f]{8}")

log = logging.getLogger(__name__)


class ChunkPlaces:
    """Chunk id → number, in few bytes: ids are hashes, so their own bits choose the bucket."""

    def __init__(self) -> None:
        self._buckets: dict[int, bytearray] = {}
        self.count = 0

    def add(self, chunk_id: bytes, number: int) -> None:
        """An id that is there already keeps its first number."""
        if self.get(chunk_id) is None:
            bucket = self._buckets.setdefault(_bucket(chunk_id), bytearray())
            bucket += chunk_id + number.to_bytes(ROW_BYTES - len(chunk_id), "little")
            self.count += 1

    def get(self, chunk_id: bytes) -> int | None:
        bucket = self._buckets.get(_bucket(chunk_id), b"")
        at = bucket.find(chunk_id)
        while at % ROW_BYTES and at >= 0:  # a match across two rows is none
            at = bucket.find(chunk_id, at + 1)
        if at < 0:
            return None
        return int.from_bytes(bucket[at + len(chunk_id) : at + ROW_BYTES], "little")


def _bucket(chunk_id: bytes) -> int:
    # The last bytes: they are keyed, so no guest can choose them (docs/design.md §9).
    return int.from_bytes(chunk_id[-4:], "little") % _BUCKETS


@dataclass(slots=True)
class _Saved:
    """A salvage session: its packs' paths, and those of them that committed sessions adopted."""

    session: str
    packs: list[str]
    used: set[str] = field(default_factory=set)

    @property
    def used_up(self) -> bool:
        return len(self.used) > USED_UP_SHARE * len(self.packs)


class Salvage:
    """One domain's. Thread-safe. Only `rescue` raises."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._lock = threading.Lock()
        self._saved: list[_Saved] = []
        self._packs: list[str] = []
        self._places: ChunkPlaces | None = None
        self._gone: set[str] = set()

    def rescue(self, dead: Sequence[str]) -> int:
        """Takes over the sealed packs of this host's dead sessions; returns how many.

        Their ABORT is the caller's next step. When there is no room for a record, nothing is taken.
        Raises StorageErrors of a point that does not answer or is damaged.
        """
        inodes: set[int] = set()
        found = [(session, names) for session in dead if (names := self._sealed(session, inodes))]
        if not found:
            return 0
        domain = self._domain
        saved = [_Saved(secrets.token_hex(16), []) for _ in found]
        ops = [
            Open(
                session=one.session,
                kind="backup",
                host=domain.host,
                incarnation=domain.incarnation,
            )
            for one in saved
        ]
        try:
            domain.append(lambda _: ops, spend_ballast=False)
        except PointFull as error:
            log.info("salvage_refused", extra={"domain": domain.paths.root, "error": str(error)})
            return 0
        for one, (session, names) in zip(saved, found, strict=True):
            self._link(one, session, names)
        with self._lock:
            self._saved += saved
            self._forget_index()
        count = sum(len(one.packs) for one in saved)
        log.info("packs_salvaged", extra={"domain": domain.paths.root, "packs": count})
        return count

    def _sealed(self, session: str, inodes: set[int]) -> list[str]:
        """Names of a dead session's sealed packs: only what is whole ever gets such a name.

        Not those that are second names of files in `inodes`, where the others are added: a session
        may have died with packs that it had adopted from the one before.
        """
        domain = self._domain
        with domain.view.read() as state:
            row = tables.sessions.get(state, session)
        if row is None or row.kind != "backup":
            return []  # an import's may be a stranger's, and would be taken for ours
        directory = os.path.join(domain.paths.packs, session)
        sealed = []
        for name in filter(_PACK_NAME.fullmatch, orphans.readable_names(domain.fs, directory)):
            try:
                found = domain.fs.stat(os.path.join(directory, name))
            except OSError:
                continue  # damaged, or a host that took us for gone has just ended the session
            if found.kind == "file" and found.inode not in inodes:
                inodes.add(found.inode)
                sealed.append(name)
        return sealed

    def _link(self, saved: _Saved, session: str, names: Sequence[str]) -> None:
        fs, packs = self._domain.fs, self._domain.paths.packs
        target = os.path.join(packs, saved.session)
        try:
            make_dirs(fs, target, packs)
            for name in names:
                path = os.path.join(packs, file_id(saved.session, int(name, 16)))
                fs.link(os.path.join(packs, session, name), path)
                saved.packs.append(path)
            fs.fsync_dir(target)
        except OSError as error:
            log.warning("salvage_incomplete", extra={"session": session, "error": str(error)})

    # Looking up -----------------------------------------------------------------------------

    def find(self, ids: Sequence[bytes]) -> dict[bytes, str]:
        """Those of the chunks that a salvaged pack holds: chunk → the pack's path."""
        if not self._saved:
            return {}
        with self._lock:
            if self._places is None:
                self._places = self._read_footers()
            numbers = {chunk: self._places.get(chunk) for chunk in ids}
            found = {
                chunk: self._packs[number]
                for chunk, number in numbers.items()
                if number is not None
            }
            return {chunk: path for chunk, path in found.items() if path not in self._gone}

    def _read_footers(self) -> ChunkPlaces:
        places = ChunkPlaces()
        self._packs = [path for saved in self._saved for path in saved.packs]
        for number, path in enumerate(self._packs):
            if places.count >= CHUNKS_LIMIT:
                log.info("salvage_not_all_indexed", extra={"domain": self._domain.paths.root})
                break
            try:
                with translated(path):
                    _, entries = read_footer(self._domain.fs, path)
            except StorageError as error:
                log.warning("salvage_unusable", extra={"path": path, "error": str(error)})
                continue
            for entry in entries:
                places.add(entry.chunk_id, number)
        return places

    def gone(self, path: str) -> None:
        """The pack at `path` could not be adopted: it is not found any more."""
        with self._lock:
            self._gone.add(path)

    def _forget_index(self) -> None:
        self._packs, self._places, self._gone = [], None, set()

    # Letting go -----------------------------------------------------------------------------

    def used(self, paths: Collection[str]) -> None:
        """A session that adopted these packs has committed."""
        with self._lock:
            for one in self._saved:
                one.used |= set(one.packs) & set(paths)
            ended = [one for one in self._saved if one.used and one.used_up]
            self._remove(ended)
        for one in ended:
            self._abort(one)

    def drop(self) -> bool:
        """Gives all of it up, for its room; whether there was any."""
        with self._lock:
            ended = list(self._saved)
            self._remove(ended)
        for one in ended:
            self._abort(one)
        return bool(ended)

    def _remove(self, ended: Sequence[_Saved]) -> None:
        if ended:
            self._saved = [one for one in self._saved if one not in ended]
            self._forget_index()

    def _abort(self, saved: _Saved) -> None:
        try:
            self._domain.abort(saved.session)
        except SessionEnded:
            # Somebody took us for dead; whether it lived to unlink is not known.
            orphans.unlink_garbage(self._domain, Garbage(sessions=[saved.session]))
        except StorageError as error:
            log.warning("salvage_left", extra={"session": saved.session, "error": str(error)})
            with self._lock:
                self._saved.append(saved)  # for the next drop
