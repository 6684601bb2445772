"""The data directory of one `vmkeep serve`: its lock, its layout, its id.

```
DATA/
  lock         flock'ed while a process works here
  host         the host's id: made once, names this host in every domain that it writes to
  state/       the state environment (engine/state.py)
  views/       views of the domains on NFS points, which can't hold an LMDB environment
  seen/        the last record that was seen of each domain (storage.log.seen)
  pool/ point/ the embedded default's pool and backup point
```
"""

from __future__ import annotations

import errno
import fcntl
import os

from engine.errors import AlreadyRunning, ConfigInvalid
from engine.ids import canonical, new_id
from storage.errors import Damaged, translated
from storage.files.fs import OsFs


class Host:
    """An open data directory. Made, if need be, and locked until `close` or the process's end.

    Raises AlreadyRunning when another process works on it; ConfigInvalid for a path that is not
    Unicode, which the state could not hold; StorageError when it can't be used.
    """

    def __init__(self, data: str) -> None:
        self.path = os.path.abspath(data)
        if self.path != self.path.encode(errors="replace").decode():
            raise ConfigInvalid(f"data directory {self.path!r}: its path is not Unicode")
        with translated(f"data directory {self.path}"):
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            self._lock_fd = _lock(os.path.join(self.path, "lock"))
            try:
                os.makedirs(self.views_path, mode=0o700, exist_ok=True)
                self.id = _host_id(os.path.join(self.path, "host"))
            except BaseException:
                self.close()
                raise

    @property
    def state_path(self) -> str:
        return os.path.join(self.path, "state")

    @property
    def views_path(self) -> str:
        return os.path.join(self.path, "views")

    @property
    def seen_path(self) -> str:
        return os.path.join(self.path, "seen")

    @property
    def default_pool_path(self) -> str:
        return os.path.join(self.path, "pool")

    @property
    def default_point_path(self) -> str:
        return os.path.join(self.path, "point")

    def make_default_pool(self) -> None:
        """The embedded default's pool is there on return. StorageError."""
        with translated(self.default_pool_path):
            os.makedirs(self.default_pool_path, mode=0o700, exist_ok=True)

    def close(self) -> None:
        """Lets another process work here."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def _lock(path: str) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise
        raise AlreadyRunning(f"another process works on {os.path.dirname(path)}") from error
    return fd


def _host_id(path: str) -> str:
    """The id in the file; made, durably, when there is none."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return _checked_id(file.read(100).strip(), path)
    except FileNotFoundError:
        made = new_id()
    fresh = f"{path}.new"
    with open(fresh, "w", encoding="ascii") as file:
        file.write(f"{made}\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(fresh, path)
    OsFs().fsync_dir(os.path.dirname(path))
    return made


def _checked_id(text: str, path: str) -> str:
    found = canonical(text)
    if found is None:
        raise Damaged(f"{path} does not hold a host id")
    return found
