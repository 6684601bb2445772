"""What a new qcow2 image is made of, so that it can be written to a file that is open already."""

from __future__ import annotations

import tempfile

from engine.errors import DiskServerRefused
from engine.qemu.process import run_qemu_img


def empty_qcow2(name: str, size_bytes: int) -> bytes:
    """A new image's content: some hundred KiB, and 16 KiB more for each TiB of the disk. `name` is
    what the disk is called in errors: DiskServerRefused, DiskServerLost."""
    try:
        with tempfile.TemporaryDirectory(prefix="vmkeep-qcow2-") as directory:
            path = f"{directory}/empty"
            run_qemu_img(name, "create", "-q", "-f", "qcow2", path, str(size_bytes))
            with open(path, "rb") as file:
                return file.read()
    except OSError as error:  # of the directory for temporary files, not of the pool's
        raise DiskServerRefused(f"{name}: no empty image of it could be made: {error}") from error
