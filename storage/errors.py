"""What storage/ can fail with, and the one place where OSError and lmdb.Error become ours.

Every leaf carries a stable `code` (the API's error table is keyed by it) and says whether the same
call may succeed later without anybody mending anything (`retryable`).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import ClassVar

import lmdb


class StorageError(Exception):
    """Root of this layer. `str(error)` names the object and what was expected of it."""

    code: ClassVar[str] = "storage_failed"
    retryable: ClassVar[bool] = False

    def __str__(self) -> str:
        return shown(super().__str__())


def shown(text: str) -> str:
    """A text with a file's name in it, as it may be kept and sent: the name need not be Unicode."""
    return text.encode(errors="backslashreplace").decode()


class PointUnreachable(StorageError):
    """The point's directory, or the server behind it, does not answer or is not there."""

    code = "point_unreachable"
    retryable = True


class FileGone(PointUnreachable):
    """A file that a record names is not there: a later record made it unreferencable, or damage."""


class PointReadOnly(StorageError):
    """The point refuses writes: mounted read-only, or no permission."""

    code = "point_read_only"


class PointFull(StorageError):
    """No room, or no quota, left on the point."""

    code = "point_full"


class PointNotEmpty(StorageError):
    """The directory holds something, but no backup point."""

    code = "point_not_empty"


class PointNewerFormat(StorageError):
    """Written by a newer vmkeep. Nothing was touched."""

    code = "point_newer_format"


class PointUnsafeMount(StorageError):
    """The mount's options would break the point's protocol (soft, old NFS, local locks)."""

    code = "point_unsafe_mount"


class Damaged(StorageError):
    """Bytes on the point, or in the state, are not what was written there."""

    code = "data_damaged"


class ViewDamaged(Damaged):
    """The view is not what was written to it. Nothing is lost by that: it is made anew at the next
    look at the domain, so the same call may succeed then."""

    retryable = True


class FileDamaged(Damaged):
    """A pack or manifest that the log names is not what it says. The log itself is sound."""


class ChunkDamaged(Damaged):
    """A chunk can't be read where it lies: `pack`, a FileId, "" when that is not known."""

    def __init__(self, detail: str, pack: str, chunk: bytes) -> None:
        super().__init__(detail)
        self.pack = pack
        self.chunk = chunk


class ChunkMissing(StorageError):
    """Chunks that a commit needs are no longer on the point; `ids` says which.

    Nothing was committed. The session stores them again from its snapshot and commits anew.
    """

    code = "chunk_missing"
    retryable = True

    def __init__(self, ids: frozenset[bytes]) -> None:
        super().__init__(f"{len(ids)} chunks are no longer on the point")
        self.ids = ids


class Refused(StorageError):
    """An operation is not valid in the state that it would follow. Nothing was changed."""

    code = "refused"


class SessionEnded(Refused):
    """The session is not open any more: somebody aborted it, or it has committed."""

    code = "session_ended"


class NotOnPoint(Refused):
    """No such live backup in this domain."""

    code = "backup_not_on_point"


class AlreadyOnPoint(Refused):
    """A live backup of this uuid is in this domain already."""

    code = "backup_already_on_point"


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def from_os_error(error: OSError, what: str) -> StorageError:
    """The StorageError that an OSError on the point stands for; `what` names the object."""
    detail = f"{what}: {error.strerror or error}"
    if error.errno in _FULL:
        return PointFull(detail)
    if error.errno in _READ_ONLY:
        return PointReadOnly(detail)
    return PointUnreachable(detail)


def _from_lmdb_error(error: lmdb.Error, what: str) -> StorageError:
    """py-lmdb gives the system's error as text only, so that is what there is to go by."""
    text = str(error)
    if isinstance(error, lmdb.DiskError) or any(os.strerror(n) in text for n in _FULL):
        return PointFull(f"{what}: {error}")
    if isinstance(error, lmdb.ReadonlyError) or any(os.strerror(n) in text for n in _READ_ONLY):
        return PointReadOnly(f"{what}: {error}")
    return PointUnreachable(f"{what}: {error}")


# What LMDB says when its own pages make no sense.
_CORRUPT = (
    lmdb.CorruptedError,
    lmdb.CursorFullError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.PageFullError,
    lmdb.PageNotFoundError,
    lmdb.ProblemError,
    lmdb.VersionMismatchError,
)


@contextlib.contextmanager
def translated(what: str, damaged: type[Damaged] = Damaged) -> Iterator[None]:
    """Turns OSError and lmdb.Error inside the block into a StorageError that names `what`;
    what LMDB can't make sense of into `damaged`."""
    try:
        yield
    except _CORRUPT as error:
        raise damaged(f"{what}: {error}") from error
    except lmdb.Error as error:
        raise _from_lmdb_error(error, what) from error
    except OSError as error:
        raise from_os_error(error, what) from error
