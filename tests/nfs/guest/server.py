"""The VM's NFS server (the kernel's) and its mounts. As root, inside the VM only.

Two disks with ext4: the first is the exports' root and has `big` in it, the second is `small`, for
filling up. Leases are 10 s, the shortest that there are.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

EXPORTS = ("big", "small")
EXPORTED = Path("/srv/nfs")
MOUNTED = Path("/mnt")
SOUND = "vers=4.2,hard"
LEASE_S = 10

_NFSD = Path("/proc/fs/nfsd")
_ONLY_LOCAL = "127.0.0.1"


def start() -> None:
    """File systems, exports, server; and `big` and `small` mounted below /mnt, soundly."""
    run("modprobe", "-a", "ext4", "nfsd", "nfsv4")
    for place in ("v4recovery", "sm", "rpc_pipefs"):
        (Path("/var/lib/nfs") / place).mkdir(parents=True, exist_ok=True)
    for name in ("/etc/exports", "/var/lib/nfs/etab", "/var/lib/nfs/rmtab"):
        Path(name).touch()
    run("mount", "-t", "nfsd", "nfsd", str(_NFSD))
    # An NFSv4 server needs a root that can be exported, which the VM's own is not.
    _export(0, "/dev/vda", EXPORTED)
    (EXPORTED / "big").mkdir(exist_ok=True)
    _export(1, "/dev/vdb", EXPORTED / "small")
    run("rpc.mountd", "-N", "2", "-N", "3")
    start_serving()
    for name in EXPORTS:
        mount(name, MOUNTED / name, SOUND)


def _export(fsid: int, disk: str, place: Path) -> None:
    place.mkdir(parents=True)
    run("mount", disk, str(place))
    options = f"rw,sync,no_subtree_check,no_root_squash,insecure,fsid={fsid}"
    run("exportfs", "-o", options, f"{_ONLY_LOCAL}:{place}")


def start_serving() -> None:
    """Begins, or goes on, to answer. What clients held open they may hold on to."""
    run("rpc.nfsd", "-N", "3", "-G", str(LEASE_S), "-L", str(LEASE_S), "4")
    # Nobody but this VM was a client: no need to wait for others to come back.
    (_NFSD / "v4_end_grace").write_text("Y")


def stop_serving() -> None:
    """From now on nobody answers; mounts hang."""
    run("rpc.nfsd", "0")


def mount(export: str, place: Path, options: str) -> None:
    """Mounts an export. RuntimeError with what mount(8) said."""
    place.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", "nfs4", "-o", options, f"{_ONLY_LOCAL}:/{export}", str(place))


@contextlib.contextmanager
def mounted(name: str, options: str) -> Iterator[Path]:
    """`big`, mounted once more, with caches of its own: a second client as far as these go."""
    place = MOUNTED / name
    mount("big", place, f"{options},nosharecache")
    try:
        yield place
    finally:
        run("umount", str(place))


def run(*command: str) -> str:
    """What it wrote. RuntimeError when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout
