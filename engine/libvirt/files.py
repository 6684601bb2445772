"""Small files that belong to a domain: firmware variables, a TPM's state."""

from __future__ import annotations

import contextlib
import errno
import os
import stat


def read_bounded(path: str, most_bytes: int) -> bytes:
    """All of a regular file, by its absolute path. Raises OSError, also for one that is larger."""
    if not path.startswith("/"):
        raise OSError(errno.EINVAL, f"{path!r} is no file's path")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"more than {most_bytes} bytes")
    return content


def write_new(path: str, content: bytes) -> None:
    """Durable. Raises OSError, FileExistsError included."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def hand_over(path: str) -> None:
    """To whom its directory belongs: a QEMU that is not root's has to use it."""
    directory, name = os.path.split(path)
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Of one directory, however often its owner puts another in its place.
            owner = os.fstat(fd)
            os.chown(name, owner.st_uid, owner.st_gid, dir_fd=fd, follow_symlinks=False)
        finally:
            os.close(fd)
