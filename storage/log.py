"""The log of a domain: numbered records, each created once by link(2).

Reading: a record is believed when it decodes, carries its own number, and is chained to the one
before (the fold checks that). Writing: `publish` is the one moment that orders all commits.
"""

from __future__ import annotations

import os
import secrets

from storage.errors import Damaged, PointUnreachable, translated
from storage.fs import Fs
from storage.publish import make_dirs, put_if_absent
from storage.record import BODY_LIMIT_BYTES, Record, decode_record, encode_record, record_digest

RECORDS_PER_EPOCH = 4096
_FILE_LIMIT_BYTES = BODY_LIMIT_BYTES + 64


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

    def _read_file(self, path: str) -> bytes:
        fd = self._fs.open_read(path)
        try:
            return self._fs.pread(fd, _FILE_LIMIT_BYTES, 0)
        finally:
            self._fs.close(fd)

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
        # Ours, but the reply was lost: only the directory's own durability is left to make sure.
        self._fs.fsync_dir(os.path.dirname(os.path.join(self._directory, record_path(record.seq))))
        return True

    def _revalidate(self, seq: int) -> None:
        """Makes an NFS client drop what it believes about the names in the record's directory."""
        directory = os.path.dirname(os.path.join(self._directory, record_path(seq)))
        scratch = os.path.join(directory, f"scratch-{secrets.token_hex(16)}")
        try:
            self._fs.close(self._fs.open_new(scratch))
            self._fs.unlink(scratch)
        except OSError:
            return  # Full or read-only: the plain read that follows decides.
