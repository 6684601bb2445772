"""qcow2 images for tests, made and changed with QEMU's own tools."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.nbd.servers import require

MIB = 1 << 20


def qemu_img(*words: str | Path) -> str:
    require("qemu-img")
    done = subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)
    return done.stdout.decode()


def qemu_io(image: Path, *commands: str) -> None:
    require("qemu-io")
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, str(image)], check=True, capture_output=True)


def create(image: Path, size: str = "16M", *options: str | Path) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", *options, image, size)
    return image


def content(image: Path) -> bytes:
    """What the image's guest sees."""
    flat = image.with_suffix(".flat")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, flat)
    found = flat.read_bytes()
    flat.unlink()
    return found


def bitmaps(image: Path) -> list[str]:
    facts = json.loads(qemu_img("info", "-U", "-f", "qcow2", "--output=json", image))
    return [one["name"] for one in facts["format-specific"]["data"].get("bitmaps", [])]
