"""Loop mounts that come and go: one is over only when nobody has it any more.

A mount namespace that somebody makes meanwhile (libvirtd does, and containers do) gets a copy of
every mount of the one that it is made in, which our umount does not reach. The file system lives on
in it as it was, shut down perhaps, and mounting the same image again gives us that one, not what is
on the disk. So who mounts does it in a namespace of its own.
"""

from __future__ import annotations

import ctypes
import subprocess
import time
from pathlib import Path

PATIENCE_S = 60.0

_CLONE_NEWNS = 0x20000


class Held(Exception):
    """Another mount namespace has the file system still: not what is tested here."""


def enter_own_mounts() -> None:
    """From here on nobody else sees, or copies, what this thread and all that it starts mount; it
    ends with them. What is mounted outside goes on being seen. Nothing happens where one may not
    mount anyway."""
    if ctypes.CDLL(None).unshare(_CLONE_NEWNS) == 0:
        subprocess.run(["mount", "--make-rslave", "/"], check=True)


def mount(image: Path, place: Path) -> None:
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)


def unmount(image: Path, place: Path, patience_s: float = PATIENCE_S) -> None:
    """On return `image` is a file like any other. Held."""
    subprocess.run(["umount", str(place)], check=True)
    deadline_s = time.monotonic() + patience_s
    while _attached(image):
        if time.monotonic() > deadline_s:
            raise Held(f"{image} is mounted in another mount namespace")
        time.sleep(0.01)


def _attached(image: Path) -> bool:
    """Whether a loop device has it."""
    loops = Path("/sys/block").glob("loop*/loop/backing_file")
    return any(_first_line(loop) == str(image.resolve()) for loop in loops)


def _first_line(path: Path) -> str:
    try:
        return path.read_text().rstrip("\n")
    except OSError:  # it was let go just now
        return ""
