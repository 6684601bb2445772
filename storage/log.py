"""The log of a domain: numbered records, each created once by link(2).

Reading: a record is believed when it decodes, carries its own number, and is chained to the one
before (the fold checks that). Writing: `publish` is the one moment that orders all commits.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets

from storage.bad_places import open_to_read, read_at
from storage.errors import Damaged, PointUnreachable, translated
from storage.fs import Fs
from storage.publish import make_dirs, put_if_absent, replace_same
from storage.record import BODY_LIMIT_BYTES, Record, decode_record, encode_record, record_digest

RECORDS_PER_EPOCH = 4096
_EPOCH = re.compile("[0-9a-f]{8}")
_SEQ = re.compile("[0-9a-f]{16}")
_SCRATCH = re.compile("scratch-[0-9a-f]{32}")
_FILE_LIMIT_BYTES = BODY_LIMIT_BYTES + 64
_FIRST_READ_BYTES = 64 << 10


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

    def _read_file(self, path: str) -> bytes:
        fd = open_to_read(self._fs, path)
        try:
            # Few are larger, and a read takes the memory that it is asked for.
            found = read_at(self._fs, fd, _FIRST_READ_BYTES, 0, path)
            if len(found) == _FIRST_READ_BYTES:
                rest_bytes = _FILE_LIMIT_BYTES - len(found)
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
        self.name_anew(record.seq)
        return True

    def name_anew(self, seq: int) -> None:
        """Makes the name of a record that is there durable, though an fsync of it may have failed.

        A failed fsync is final: the next one reports success for what the first has dropped. So the
        name is written again, by putting an identical file in its place. Until that has succeeded
        the record is neither acknowledged nor believed by its author, and nothing follows it.
        """
        path = os.path.join(self._directory, record_path(seq))
        tmp = os.path.join(self._tmp, secrets.token_hex(16))
        with translated(path):
            make_dirs(self._fs, self._tmp, os.path.dirname(self._tmp))
            replace_same(self._fs, tmp, path, self._read_file(path))

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
