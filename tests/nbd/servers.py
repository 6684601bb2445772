"""Real NBD servers, each on a unix socket and with one disk, for as long as a test needs them."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.nbd.connection import NbdAddress

PATIENCE_S = 30.0
_ACCEPTS = 1 << 16  # the flag of a socket that listens, in /proc/net/unix


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs."""

    address: NbdAddress
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def require(*tools: str) -> None:
    """Skips the test unless all tools are there."""
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")


@contextlib.contextmanager
def qemu_nbd(image: Path, *options: str, form: str = "raw") -> Iterator[Server]:
    """`qemu-nbd` with an image; as many clients as wanted, until the block ends."""
    require("qemu-nbd")
    socket_path = image.with_name(f"{image.name}.sock")
    socket_path.unlink(missing_ok=True)
    command = ["qemu-nbd", "-f", form, "-t", "-e", "16", "-k", str(socket_path), *options]
    with serving([*command, str(image)], socket_path) as server:
        yield server


@contextlib.contextmanager
def nbdkit(directory: Path, *arguments: str) -> Iterator[Server]:
    """`nbdkit` with the plugin, filters and parameters given."""
    require("nbdkit")
    socket_path = directory / "nbdkit.sock"
    socket_path.unlink(missing_ok=True)
    with serving(["nbdkit", "-f", "-U", str(socket_path), *arguments], socket_path) as server:
        yield server


@contextlib.contextmanager
def serving(command: Sequence[str], socket_path: Path) -> Iterator[Server]:
    """Runs `command`, which has to listen on `socket_path`."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        _await_listener(process, socket_path)
        yield Server(NbdAddress(str(socket_path)), process)
    finally:
        process.kill()
        process.wait()


def _await_listener(process: subprocess.Popen[bytes], socket_path: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        if _listens(socket_path):
            return
        time.sleep(0.005)
    raise AssertionError(f"no server: {process.args!r}")


def _listens(socket_path: Path) -> bool:
    """By proc(5): the name is there before its socket listens, and a connection made to find out
    would be counted as somebody's, once the server accepts it."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return any(row[-1] == str(socket_path) and int(row[3], 16) & _ACCEPTS for row in rows)
