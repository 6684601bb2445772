"""The machine that a run came from: what its figures depend on, and no name of it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from bench.results import Machine

_ROOT = Path(__file__).parent.parent


def describe(place: Path) -> Machine:
    """This machine, with the file system that `place` is on."""
    return Machine(
        cpu=_first(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release().partition("-")[0],  # the rest may name an installation
        file_system=file_system(place, Path("/proc/self/mounts").read_text()),
        python=platform.python_version(),
    )


def file_system(place: Path, mounts: str) -> str:
    """The type of the file system that holds `place`, by the text of /proc/self/mounts."""
    best, found = -1, "unknown"
    for line in mounts.splitlines():
        _, at, kind, *_ = line.split(" ")
        # The last mount on a place hides those before.
        if len(at) >= best and place.resolve().is_relative_to(at.replace("\\040", " ")):
            best, found = len(at), kind
    return found


def commit() -> str:
    """The commit that is measured, "+" behind it when files differ from it; "" outside of git."""
    try:
        text = _git("rev-parse", "--short=12", "HEAD")
        return text + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=_ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _first(path: Path, member: str) -> str:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == member:
            return value.strip()
    return ""
