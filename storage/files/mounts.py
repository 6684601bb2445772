"""Whether a mount keeps the promises that the point's protocol rests on.

Theory: the log orders everything by link(2) (docs/design.md §5), so the server has to decide that
link, and a write that was reported durable has to be durable. A local file system does both. NFS
does with `hard` (a soft timeout loses writes silently), version 4.1 or later (sessions make a
repeated LINK answer as the first did) and locks kept at the server. Other network file systems
promise neither.

Pure: the caller reads /proc/self/mountinfo (proc(5)) and resolves symbolic links in the path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from storage.errors import PointUnsafeMount

_NFS = frozenset({"nfs", "nfs4"})
_OTHER_NETWORK = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "coda", "glusterfs", "gpfs", "lustre", "ncpfs"}
    | {"smb3", "smbfs", "fuse.ceph", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs"}
)
_MINIMUM_VERSION = (4, 1)


MountKind: TypeAlias = Literal["local", "nfs"]


@dataclass(frozen=True, slots=True)
class MountVerdict:
    """`problem` is empty when the mount is sound."""

    kind: MountKind
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Mount:
    """One line of mountinfo."""

    mount_id: str
    parent_id: str
    mount_point: str
    fs_type: str
    options: dict[str, str]  # of the mount and of its superblock; value "" for a bare word


def require_sound_mount(path: str, mountinfo: str) -> MountVerdict:
    """check_mount, but raises PointUnsafeMount, naming the reason, when there is a problem."""
    verdict = check_mount(path, mountinfo)
    if verdict.problem:
        raise PointUnsafeMount(f"{path}: {verdict.problem}")
    return verdict


def check_mount(path: str, mountinfo: str) -> MountVerdict:
    """Judges the mount that holds `path` (absolute, no symbolic links), given mountinfo's text."""
    mount = _mount_of(path, _parsed(mountinfo))
    if mount is None:
        return MountVerdict("local", "no mount in /proc/self/mountinfo holds this path")
    if mount.fs_type in _NFS:
        return MountVerdict("nfs", _nfs_problem(mount.options))
    if mount.fs_type in _OTHER_NETWORK:
        problem = f"{mount.fs_type} is a network file system other than NFS 4.1 or later"
        return MountVerdict("local", problem)
    return MountVerdict("local")


def _nfs_problem(options: dict[str, str]) -> str:
    version = _nfs_version(options)
    if "hard" not in options or "soft" in options or "softerr" in options:
        return "the NFS mount is not `hard`: a timeout could lose writes silently"
    if version < _MINIMUM_VERSION:
        return f"NFS version {version[0]}.{version[1]}; 4.1 or later is needed"
    if "nolock" in options or options.get("local_lock") != "none":
        return "the NFS mount keeps locks on this host (`nolock` or `local_lock`), not the server"
    return ""


def _nfs_version(options: dict[str, str]) -> tuple[int, int]:
    """(major, minor); (0, 0) when the options do not say."""
    found = re.fullmatch(r"(\d+)(?:\.(\d+))?", options.get("vers", options.get("nfsvers", "")))
    if found is None:
        return (0, 0)
    minor = found[2] or options.get("minorversion", "0")
    return int(found[1]), int(minor) if minor.isdecimal() else 0


def _mount_of(path: str, mounts: list[_Mount]) -> _Mount | None:
    """Walks down as the kernel does, so that a mount hidden by a later one is not taken.

    On each mount the first mount point that the path meets is the shortest one.
    """
    over = [mount for mount in mounts if _holds(mount.mount_point, path)]
    known = {mount.mount_id for mount in mounts}
    current: _Mount | None = None
    step = [m for m in over if m.parent_id not in known or m.parent_id == m.mount_id]
    while step:
        current = min(step, key=lambda mount: len(mount.mount_point))
        over.remove(current)
        step = [mount for mount in over if mount.parent_id == current.mount_id]
    return current


def _holds(mount_point: str, path: str) -> bool:
    return path == mount_point or path.startswith(mount_point.rstrip("/") + "/")


def _parsed(mountinfo: str) -> list[_Mount]:
    mounts = []
    for line in mountinfo.splitlines():
        left, dash, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        if not dash or len(fields) < 6 or len(tail) < 3:
            continue
        options = _options(fields[5]) | _options(tail[2])
        mounts.append(_Mount(fields[0], fields[1], _unescaped(fields[4]), tail[0], options))
    return mounts


def _options(text: str) -> dict[str, str]:
    return {name: value for name, _, value in (word.partition("=") for word in text.split(","))}


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)
