"""A session's packs: frames go into one while those before it are sealed (fsync, link) by a thread.

What is here counts only by the session's COMMIT or RETIRE, which gets the seals (`seal_all`).
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from storage.errors import PointFull, translated
from storage.files.ballast import reserve_bytes
from storage.files.publish import discard, link_or_copy, make_dirs
from storage.format.chunks import FRAME_HEADER_BYTES, Frame
from storage.format.packs import PackWriter, read_footer
from storage.format.record import FileSeal, file_id
from storage.format.sealed import Seal

if TYPE_CHECKING:
    from storage.domain.domain import Domain

OWN_IDS_REMEMBERED = 1 << 17
UNSEALED_PACKS_LIMIT = 2


class NewPacks:
    """See the module. Any thread may call `store`, `adopt` and `in`.

    `tmp`: the session's directory of files without a name. `may_use_reserve`: see `_require_room`.
    """

    def __init__(self, domain: Domain, session: str, tmp: str, *, may_use_reserve: bool) -> None:
        self._domain = domain
        self._session = session
        self._tmp = tmp
        self._may_use_reserve = may_use_reserve
        self._lock = threading.Lock()
        self._own: dict[bytes, None] = {}
        self._pack: PackWriter | None = None
        self._numbers = itertools.count()
        self._pack_n = 0
        self._sealing: list[Future[FileSeal]] = []
        self._sealer = ThreadPoolExecutor(1, f"seal-{session[:8]}")
        self._slots = threading.Semaphore(UNSEALED_PACKS_LIMIT)

    def __contains__(self, chunk: bytes) -> bool:
        """Whether it was stored here, as far back as is remembered."""
        return chunk in self._own

    def store(self, frames: Sequence[Frame], *, again: bool = False) -> int:
        """See Session.store."""
        with translated(self._tmp), self._lock:
            new = list({frame.chunk_id: frame for frame in frames}.values())
            new = [frame for frame in new if again or frame.chunk_id not in self._own]
            if not new:
                return 0
            self._raise_failed_seal()
            pack = self._pack or self._next_pack()
            pack.add_many(new)
            self._remember(new)
            if pack.size_bytes >= self._domain.pack_size_bytes:
                self._start_seal()
        return sum(FRAME_HEADER_BYTES + frame.stored_len for frame in new)

    def _remember(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            self._own[frame.chunk_id] = None
        # Bounded: an id that is forgotten here may be stored twice, which costs room, not truth.
        while len(self._own) > OWN_IDS_REMEMBERED:
            del self._own[next(iter(self._own))]

    def _next_pack(self) -> PackWriter:
        self._require_room()
        self._slots.acquire()
        try:
            make_dirs(self._domain.fs, self._tmp, self._domain.paths.root)
            self._pack_n = next(self._numbers)
            self._pack = PackWriter(
                self._domain.fs,
                f"{self._tmp}/pack-{self._pack_n:08x}",
                bytes.fromhex(self._session),
                self._pack_n,
                self._domain.chunk_size,
            )
        except BaseException:
            self._slots.release()
            raise
        return self._pack

    def _require_room(self) -> None:
        """Backups stop while there is still room for the writes of a delete and a gc."""
        if self._may_use_reserve:
            return
        root = self._domain.paths.root
        room = self._domain.fs.room(root)
        reserve = reserve_bytes(room)
        if room.free_bytes <= reserve and self._domain.salvage.drop():
            room = self._domain.fs.room(root)
        if room.free_bytes <= reserve:
            raise PointFull(
                f"{root}: {room.free_bytes} bytes free; {reserve} are kept for deleting"
            )

    def _start_seal(self) -> None:
        pack, n = self._pack, self._pack_n
        if pack is not None:
            self._pack = None
            self._sealing.append(self._sealer.submit(self._seal_pack, pack, n))

    def _seal_pack(self, pack: PackWriter, n: int) -> FileSeal:
        try:
            path = self._domain.paths.pack(file_id(self._session, n))
            with translated(path):
                make_dirs(self._domain.fs, os.path.dirname(path), self._domain.paths.root)
                return file_seal(n, pack.seal(path))
        except BaseException:
            pack.abandon()
            raise
        finally:
            self._slots.release()

    def _raise_failed_seal(self) -> None:
        for future in self._sealing:
            if future.done():
                future.result()

    def adopt(self, path: str) -> str:
        """See Session.adopt_pack."""
        domain = self._domain
        with self._lock:
            n = next(self._numbers)
        final = domain.paths.pack(file_id(self._session, n))
        with translated(final):
            make_dirs(domain.fs, os.path.dirname(final), domain.paths.root)
            make_dirs(domain.fs, self._tmp, domain.paths.root)
            link_or_copy(domain.fs, path, f"{self._tmp}/pack-{n:08x}", final)
            try:
                seal, _ = read_footer(domain.fs, final)
            except BaseException:
                discard(domain.fs, final)
                raise
        done: Future[FileSeal] = Future()
        done.set_result(file_seal(n, seal))
        self._sealing.append(done)
        return file_id(self._session, n)

    def seal_all(self) -> tuple[FileSeal, ...]:
        """Of all packs, once they are sealed; raises what one failed with."""
        self.seal_open()
        return tuple(future.result() for future in self._sealing)

    def seal_open(self) -> None:
        """Begins to seal the pack that is not full yet."""
        with self._lock:
            self._start_seal()

    def close(self) -> None:
        """Waits for what is being sealed; nothing can be stored any more."""
        self._sealer.shutdown()

    def abandon(self) -> None:
        """As close, without the pack that is not full yet."""
        self.close()
        if self._pack is not None:
            self._pack.abandon()


def file_seal(n: int, seal: Seal) -> FileSeal:
    """A sealed file as a record names it."""
    return FileSeal(n=n, size_bytes=seal.size_bytes, count=seal.count, digest=seal.digest)
