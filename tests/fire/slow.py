"""A file system that is slow: most of the time whoever writes to it stands still."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# argv: place stop_s go_s. A process of its own: a thread of ours that waits for the file system
# (a page of LMDB's lock file) may keep all others from going on. It ends with its standard input,
# and says when it has begun.
_STOP_AND_GO = """
import fcntl, os, select, sys
medium, stop_s, go_s = os.open(sys.argv[1], os.O_RDONLY), float(sys.argv[2]), float(sys.argv[3])
while not select.select([0], [], [], go_s)[0]:
    fcntl.ioctl(medium, 0xC0045877, 0)
    os.write(1, b"!")
    select.select([0], [], [], stop_s)
    fcntl.ioctl(medium, 0xC0045878, 0)
"""


@contextlib.contextmanager
def stop_and_go(place: Path, stop_s: float, go_s: float) -> Iterator[Callable[[], None]]:
    """What is yielded makes it slow, to the end of the block: nobody may write for `stop_s`, then
    everybody for `go_s`, and so on."""
    started: list[subprocess.Popen[bytes]] = []

    def begin() -> None:
        command = [sys.executable, "-ISc", _STOP_AND_GO, str(place), str(stop_s), str(go_s)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.read(1) == b"!"

    try:
        yield begin
    finally:
        for process in started:
            process.communicate()
            assert process.returncode == 0
