"""How a file gets its final name: the only way in which files come to be on the point.

Theory: write under a name in tmp/, fsync, close, link(2) to the final name, fsync the directory,
unlink the first name. Before the link nobody can see the file; after it the file is whole; link
never overwrites. Without the first fsync a crash may leave the name with no bytes, without the
second it may lose the name. Nothing here is retried: after a failed fsync the kernel may have
dropped the very pages that it could not write, and a second fsync would report success.

All functions raise plain OSError; the callers translate.
"""

from __future__ import annotations

import contextlib
import errno
import posixpath

from storage.files.fs import Fs

_COPY_BYTES = 4 << 20
# No hard links here at all, too many of them, or not across this boundary.
_NO_LINK = frozenset({errno.EPERM, errno.EMLINK, errno.EXDEV, errno.ENOTSUP})


def publish(fs: Fs, fd: int, tmp_path: str, final_path: str) -> None:
    """Gives the written file `fd` at `tmp_path` its final name. Durable on return.

    Takes `fd` over: it is closed, and `tmp_path` is gone, whatever happens. Raises FileExistsError
    when another file has the final name. After any other error the final name may be there or
    not; who must know reads it.
    """
    try:
        _make_durable(fs, fd)
        _link_ours(fs, tmp_path, final_path)
        fs.fsync_dir(posixpath.dirname(final_path))
    finally:
        discard(fs, tmp_path)


def put_if_absent(fs: Fs, tmp_path: str, final_path: str, body: bytes) -> None:
    """Makes `final_path` with exactly these bytes. Durable on return. Raises as publish does."""
    publish(fs, write_new(fs, tmp_path, body), tmp_path, final_path)


def write_new(fs: Fs, tmp_path: str, body: bytes) -> int:
    """A new file with these bytes, not durable; the descriptor is the caller's. None is left when
    it fails."""
    fd = fs.open_new(tmp_path)
    try:
        fs.pwrite(fd, [body], 0)
    except BaseException:
        close_discarded(fs, fd)
        discard(fs, tmp_path)
        raise
    return fd


def replace_same(fs: Fs, tmp_path: str, final_path: str, body: bytes) -> None:
    """Puts a file with these bytes, which are those of the file there, in its place. Durable on
    return. After an error the name is there, but not surely durable."""
    fd = write_new(fs, tmp_path, body)
    try:
        _make_durable(fs, fd)
        fs.rename(tmp_path, final_path)
    except BaseException:
        discard(fs, tmp_path)
        raise
    fs.fsync_dir(posixpath.dirname(final_path))


def link_or_copy(fs: Fs, source: str, tmp_path: str, final_path: str) -> None:
    """Gives an immutable file a second name, or a copy where links don't work. Durable on return.

    Raises FileExistsError when `final_path` is there, FileNotFoundError when `source` is not.
    """
    try:
        fs.link(source, final_path)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        _copy(fs, source, tmp_path, final_path)
    else:
        fs.fsync_dir(posixpath.dirname(final_path))


def _copy(fs: Fs, source: str, tmp_path: str, final_path: str) -> None:
    read_fd = fs.open_read(source)
    try:
        fd = fs.open_new(tmp_path)
        try:
            offset = 0
            while piece := fs.pread(read_fd, _COPY_BYTES, offset):
                offset += fs.pwrite(fd, [piece], offset)
        except BaseException:
            close_discarded(fs, fd)
            discard(fs, tmp_path)
            raise
    finally:
        fs.close(read_fd)
    publish(fs, fd, tmp_path, final_path)


def make_dirs(fs: Fs, path: str, below: str) -> None:
    """Makes directory `path` and what is missing between it and the existing `below`. Durable.

    Raises NotADirectoryError when a name on the way is something else, ValueError when `path` is
    not under `below`.
    """
    missing = posixpath.relpath(path, below).split("/")
    if missing[0] == "..":
        raise ValueError(f"{path} is not under {below}")
    for name in missing:
        if name != ".":
            below = _make_dir(fs, below, name)


def discard(fs: Fs, tmp_path: str) -> None:
    """Unlinks a temporary name. What stays behind there is cleared with its session."""
    with contextlib.suppress(OSError):
        fs.unlink(tmp_path)


def close_discarded(fs: Fs, fd: int) -> None:
    """Closes a file whose bytes nobody needs, so what close reports does not matter."""
    with contextlib.suppress(OSError):
        fs.close(fd)


def _make_durable(fs: Fs, fd: int) -> None:
    try:
        fs.fsync(fd)
    except BaseException:
        close_discarded(fs, fd)
        raise
    fs.close(fd)


def _link_ours(fs: Fs, tmp_path: str, final_path: str) -> None:
    """link, which also succeeds when an NFS server carried it out but its first reply got lost."""
    try:
        fs.link(tmp_path, final_path)
    except FileExistsError:
        if fs.stat(final_path).inode != fs.stat(tmp_path).inode:
            raise


def _make_dir(fs: Fs, parent: str, name: str) -> str:
    path = posixpath.join(parent, name)
    made = True
    try:
        fs.mkdir(path)
    except FileExistsError:
        made = False
        if fs.stat(path).kind != "directory":
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", path) from None
    # Also for one that was there: who made it may have been killed before this step.
    try:
        fs.fsync_dir(parent)
    except OSError:
        if made:  # else a second attempt would find it, and believe the second fsync
            with contextlib.suppress(OSError):
                fs.rmdir(path)
        raise
    return path
