"""The log of a domain: numbered records, each created once by link(2).

Reading: a record is believed when it decodes, carries its own number, and is chained to the one
before (the fold checks that). Writing: `publish` is the one moment that orders all commits.
Who reads a log from its start may take records out of bundles (storage.format.bundles).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from collections.abc import Sequence

from storage.errors import (
    Damaged,
    PointFull,
    PointReadOnly,
    PointUnreachable,
    StorageError,
    translated,
)
from storage.files.bad_places import open_to_read, read_at
from storage.files.fs import Fs
from storage.files.publish import make_dirs, put_if_absent, replace_same
from storage.format import bundles
from storage.format.bundles import SUFFIX, decode_bundle, encode_bundle, stretch_of
from storage.format.record import (
    BODY_LIMIT_BYTES,
    Record,
    decode_record,
    encode_record,
    record_digest,
)

RECORDS_PER_EPOCH = 4096
_EPOCH = re.compile("[0-9a-f]{8}")
_SEQ = re.compile("[0-9a-f]{16}")
_SCRATCH = re.compile("scratch-[0-9a-f]{32}")
_FILE_LIMIT_BYTES = BODY_LIMIT_BYTES + 64
_FIRST_READ_BYTES = 64 << 10

log = logging.getLogger(__name__)


def record_path(seq: int) -> str:
    """Path of a record below `log/`."""
    return f"{seq // RECORDS_PER_EPOCH:08x}/{seq:016x}"


class Log:
    """One domain's log. Safe for threads; holds no state."""

    def __init__(self, fs: Fs, directory: str, tmp: str) -> None:
        self._fs = fs
        self._directory = directory
        self._tmp = tmp

    def read(self, seq: int) -> tuple[Record, bytes] | None:
        """Record `seq` and its digest; None when there is none yet.

        Raises Damaged, PointNewerFormat, PointUnreachable.
        """
        path = os.path.join(self._directory, record_path(seq))
        with translated(path):
            try:
                body = self._read_file(path)
            except FileNotFoundError:
                self._require_directory()
                return None
        record = decode_record(body, path)
        if record.seq != seq:
            raise Damaged(f"{path}: holds record {record.seq}")
        return record, record_digest(body)

    def read_bundled(self, seq: int, previous: bytes) -> list[tuple[Record, bytes]]:
        """The records from `seq` to the last of its bundle, and their digests: those of the log
        that follow a record of digest `previous`. Empty when there is no bundle that proves so.
        """
        path = self._bundle_path(seq)
        try:
            with translated(path):
                try:
                    body = self._read_file(path, bundles.FILE_LIMIT_BYTES)
                except FileNotFoundError:
                    return []
            return self._proved(body, seq, previous, path)
        except StorageError as error:
            log.warning("bundle_unusable", extra={"path": path, "error": str(error)})
            return []

    def _proved(
        self, bundle: bytes, seq: int, previous: bytes, what: str
    ) -> list[tuple[Record, bytes]]:
        """Raises StorageErrors."""
        first, last = stretch_of(seq)
        files = decode_bundle(bundle, last - first + 1, what)
        if files[-1] != self._file_of(last):
            raise Damaged(f"{what}: record {last} is another one in the log")
        return _chained(files[seq - first :], seq, previous, what)

    def bundle(self, seq: int) -> bool:
        """Writes the bundle of the stretch that `seq` is in, all of whose records are in the log;
        whether it was not there. Durable on return. Records too large for one stay without.

        Raises Damaged, PointNewerFormat, PointUnreachable, PointFull, PointReadOnly.
        """
        path = self._bundle_path(seq)
        with translated(path):
            if self._is_there(path):
                return False
            files = self._stretch(seq)
            if not files:
                return False
            _chained(files, stretch_of(seq)[0], None, f"{self._directory}: a bundle for {path}")
            body = encode_bundle(files)
            make_dirs(self._fs, self._tmp, os.path.dirname(self._tmp))
            try:
                put_if_absent(self._fs, os.path.join(self._tmp, secrets.token_hex(16)), path, body)
            except FileExistsError:
                return False  # another host was at it, too
        return True

    def bundles(self) -> list[str]:
        """Paths of what is named as a bundle."""
        with translated(self._directory):
            return [
                os.path.join(self._directory, epoch, name)
                for epoch in filter(_EPOCH.fullmatch, self._fs.listdir(self._directory))
                for name in self._fs.listdir(os.path.join(self._directory, epoch))
                if name.endswith(SUFFIX)
            ]

    def check_bundle(self, path: str) -> None:
        """Damaged, or another StorageError, unless that bundle is what `bundle` makes there."""
        name = os.path.basename(path).removesuffix(SUFFIX)
        seq = int(name, 16) if _SEQ.fullmatch(name) else 0
        if path != self._bundle_path(seq):
            raise Damaged(f"{path}: is no bundle's name")
        with translated(path):
            body = self._read_file(path, bundles.FILE_LIMIT_BYTES)
        first, last = stretch_of(seq)
        if decode_bundle(body, last - first + 1, path) != self._stretch(seq):
            raise Damaged(f"{path}: holds other records than the log")

    def _bundle_path(self, seq: int) -> str:
        return os.path.join(self._directory, record_path(stretch_of(seq)[0]) + SUFFIX)

    def _is_there(self, path: str) -> bool:
        try:
            self._fs.stat(path)
        except FileNotFoundError:
            return False
        return True

    def _stretch(self, seq: int) -> list[bytes]:
        """The files of all its records; none when they are too much for a bundle."""
        first, last = stretch_of(seq)
        files: list[bytes] = []
        left_bytes = bundles.RECORDS_LIMIT_BYTES
        for number in range(first, last + 1):
            files.append(self._file_of(number))
            left_bytes -= len(files[-1])
            if left_bytes < 0:
                return []
        return files

    def _file_of(self, seq: int) -> bytes:
        path = os.path.join(self._directory, record_path(seq))
        with translated(path):
            return self._read_file(path)

    def read_surely(self, seq: int) -> tuple[Record, bytes] | None:
        """`read`, but None only when the server says so, not an NFS client's memory."""
        found = self.read(seq)
        if found is None:
            self._revalidate(seq)
            found = self.read(seq)
        return found

    def ends_before(self, seq: int) -> bool:
        """Whether the server has no record `seq`. Unlike `read_surely` it fails when the server
        can't be asked: PointFull, PointReadOnly, PointUnreachable."""
        directory = os.path.dirname(os.path.join(self._directory, record_path(seq)))
        with translated(directory):
            make_dirs(self._fs, directory, self._directory)
            self._touch(directory)
        return self.read(seq) is None

    def make_names_durable(self, first: int, last: int) -> None:
        """The names of the records `first` to `last`, which were read, survive a power failure."""
        for epoch in sorted({os.path.dirname(record_path(seq)) for seq in range(first, last + 1)}):
            directory = os.path.join(self._directory, epoch)
            with translated(directory):
                self._fs.fsync_dir(directory)

    def _read_file(self, path: str, limit_bytes: int = _FILE_LIMIT_BYTES) -> bytes:
        fd = open_to_read(self._fs, path)
        try:
            # Few are larger, and a read takes the memory that it is asked for.
            found = read_at(self._fs, fd, _FIRST_READ_BYTES, 0, path)
            if len(found) == _FIRST_READ_BYTES:
                rest_bytes = limit_bytes - len(found)
                found += read_at(self._fs, fd, rest_bytes, len(found), path)
            return found
        finally:
            self._fs.close(fd)

    def newest_name(self) -> int:
        """The highest number that a record has by its name; 0 for none. PointUnreachable."""
        with translated(self._directory):
            epochs = [name for name in self._fs.listdir(self._directory) if _EPOCH.fullmatch(name)]
            for epoch in sorted(epochs, reverse=True):
                names = self._fs.listdir(os.path.join(self._directory, epoch))
                numbers = [int(name, 16) for name in names if _SEQ.fullmatch(name)]
                if numbers:
                    return max(numbers)
        return 0

    def _require_directory(self) -> None:
        """A log that has vanished as a whole must not read as an empty one."""
        if self._fs.stat(self._directory).kind != "directory":
            raise PointUnreachable(f"{self._directory} is no directory")

    def publish(self, record: Record) -> bool:
        """Puts the record at its number, durably. False: another record has that number.

        A doubtful reply is settled by reading the name: our nonce there means it was us.
        """
        path = os.path.join(self._directory, record_path(record.seq))
        tmp = os.path.join(self._tmp, record.nonce.hex())
        with translated(path):
            make_dirs(self._fs, os.path.dirname(path), self._directory)
            make_dirs(self._fs, self._tmp, os.path.dirname(self._tmp))
            try:
                put_if_absent(self._fs, tmp, path, encode_record(record))
                return True
            except OSError as error:
                return self._settle(record, error)

    def _settle(self, record: Record, error: OSError) -> bool:
        self._revalidate(record.seq)
        found = self.read(record.seq)
        if found is None:
            raise error
        if found[0].nonce != record.nonce:
            return False
        try:
            self.name_anew(record.seq, found[1])
        except (PointFull, PointReadOnly) as failed:  # which would say that there is no record
            raise PointUnreachable(str(failed)) from failed
        return True

    def name_anew(self, seq: int, digest: bytes) -> None:
        """Makes the name of a record that is there durable, though an fsync of it may have failed.

        A failed fsync is final: the next one reports success for what the first has dropped. So the
        name is written again, by putting an identical file in its place. Until that has succeeded
        the record is neither acknowledged nor believed by its author, and nothing follows it.

        `digest` is the record's, as it was read before. PointUnreachable when other bytes come now:
        they must not take its place.
        """
        path = os.path.join(self._directory, record_path(seq))
        tmp = os.path.join(self._tmp, secrets.token_hex(16))
        with translated(path):
            make_dirs(self._fs, self._tmp, os.path.dirname(self._tmp))
            body = self._read_file(path)
            if record_digest(body) != digest:
                raise PointUnreachable(f"{path}: reads otherwise than a moment ago")
            replace_same(self._fs, tmp, path, body)

    def _revalidate(self, seq: int) -> None:
        """Makes an NFS client drop what it believes about the names in the record's directory."""
        directory = os.path.dirname(os.path.join(self._directory, record_path(seq)))
        try:
            self._touch(directory)
        except OSError:
            return  # Full or read-only: the plain read that follows decides.

    def _touch(self, directory: str) -> None:
        scratch = os.path.join(directory, f"scratch-{secrets.token_hex(16)}")
        self._fs.close(self._fs.open_new(scratch))
        with contextlib.suppress(FileNotFoundError):  # another host took it for left behind
            self._fs.unlink(scratch)

    def clear_scratch(self) -> None:
        """Removes what killed processes left of `_touch`. Those at work don't mind."""
        with translated(self._directory):
            for epoch in filter(_EPOCH.fullmatch, self._fs.listdir(self._directory)):
                directory = os.path.join(self._directory, epoch)
                for name in filter(_SCRATCH.fullmatch, self._fs.listdir(directory)):
                    with contextlib.suppress(FileNotFoundError):
                        self._fs.unlink(os.path.join(directory, name))


def _chained(
    files: Sequence[bytes], first: int, previous: bytes | None, what: str
) -> list[tuple[Record, bytes]]:
    """Records from number `first` on, and their digests; each names the one before it, the first
    one `previous` if it is given. Damaged, PointNewerFormat."""
    found = []
    for number, body in enumerate(files, first):
        record = decode_record(body, what)
        if record.seq != number or previous not in (None, record.previous):
            raise Damaged(f"{what}: record {number} does not follow the one before")
        previous = record_digest(body)
        found.append((record, previous))
    return found
