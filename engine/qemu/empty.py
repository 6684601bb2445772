"""What a new qcow2 image is made of, so that it can be written to a file that is open already."""

from __future__ import annotations

import tempfile

from engine.qemu.process import run_qemu_img


def empty_qcow2(name: str, size_bytes: int) -> bytes:
    """A new image's content: some hundred KiB, and 16 KiB more for each TiB of the disk. `name` is
    what the disk is called in errors: DiskServerRefused, DiskServerLost."""
    with tempfile.TemporaryDirectory(prefix="vmkeep-qcow2-") as directory:
        path = f"{directory}/empty"
        run_qemu_img(name, "create", "-q", "-f", "qcow2", path, str(size_bytes))
        with open(path, "rb") as file:
            return file.read()
