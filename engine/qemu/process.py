"""QEMU's tools as children: bounded in time, ended with us, their complaints in our errors.

A qemu-nbd of ours serves one client and ends with its last connection, so it can't outlive us: the
kernel closes our end. Until it has a connection the kernel kills it when we die (PR_SET_PDEATHSIG,
by way of setpriv; in a child between fork and exec of a process with threads we could not ask for
it).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import IO, TypeVar

from engine.errors import DiskServerLost, DiskServerRefused
from engine.nbd.connection import NbdAddress
from storage.files.in_flight import InFlight

OpenT = TypeVar("OpenT")

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 60.0  # a writer's last metadata and fsync
TOOL_TIMEOUT_S = 60.0
_ASK_EVERY_S = 0.005
_MOST_COMPLAINT_BYTES = 1000
_ENDS_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")


class QemuNbd:
    """A qemu-nbd that serves one image to one client. A context manager; its end ends it."""

    def __init__(self, name: str, options: Sequence[str], fds: Iterable[int] = ()) -> None:
        """Starts it. `name`: the image's path; `fds`: descriptors that it inherits."""
        self._name = name
        self._directory = tempfile.TemporaryDirectory(prefix="vmkeep-nbd-")  # mode 0700
        self._complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by _forget)
        self.address = NbdAddress(f"{self._directory.name}/s")
        command = [*_ENDS_WITH_US, "qemu-nbd", "--socket", self.address.path, *options]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._complaints,
                stderr=self._complaints,
                pass_fds=tuple(fds),
            )
        except OSError as error:
            self._forget()
            raise DiskServerRefused(f"{name}: {error.filename} can't be run: {error}") from error

    def connected(self, connect: Callable[[], OpenT]) -> OpenT:
        """What `connect` returns, which is tried until the server listens.

        DiskServerRefused when it ends instead, DiskServerLost when it takes too long.
        """
        with InFlight(self._name):
            return self._connected(connect)

    def _connected(self, connect: Callable[[], OpenT]) -> OpenT:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return connect()
            except DiskServerLost as error:
                if self._process.poll() is not None:
                    raise self._refused() from error
                if time.monotonic() > deadline:
                    raise
            time.sleep(_ASK_EVERY_S)

    def wait(self) -> None:
        """After its client has gone: returns when all that was written is in the image.

        DiskServerRefused when that failed, DiskServerLost when it takes too long.
        """
        try:
            with InFlight(self._name):
                status = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise DiskServerLost(f"{self._name}: qemu-nbd does not end") from None
        if status:
            raise self._refused()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._forget()

    def __enter__(self) -> QemuNbd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget(self) -> None:
        self._complaints.close()
        with contextlib.suppress(OSError):
            self._directory.cleanup()

    def _refused(self) -> DiskServerRefused:
        said = os.pread(self._complaints.fileno(), _MOST_COMPLAINT_BYTES, 0)
        status = self._process.returncode
        return DiskServerRefused(f"{self._name}: {_told(said) or f'qemu-nbd ended: {status}'}")


def run_qemu_img(name: str, *arguments: str) -> bytes:
    """What `qemu-img` says of the image at the path `name`. DiskServerRefused, with its complaint,
    when it fails."""
    command = [*_ENDS_WITH_US, "qemu-img", *arguments]
    try:
        with InFlight(name):
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=TOOL_TIMEOUT_S,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise DiskServerLost(f"{name}: qemu-img {arguments[0]} does not end") from None
    except OSError as error:
        raise DiskServerRefused(f"{name}: {error.filename} can't be run: {error}") from error
    if done.returncode:
        raise DiskServerRefused(
            f"{name}: {_told(done.stderr) or f'qemu-img {arguments[0]} failed'}"
        )
    return done.stdout


def image_options(driver: str, path: str, *more: str) -> str:
    """For --image-opts: the file at `path`, whatever its name looks like."""
    return ",".join(
        [f"driver={driver}", "file.driver=file", f"file.filename={path.replace(',', ',,')}", *more]
    )


def _told(said: bytes) -> str:
    return " ".join(said[:_MOST_COMPLAINT_BYTES].decode(errors="replace").split())
