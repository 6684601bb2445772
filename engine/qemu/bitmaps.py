"""Dirty bitmaps in a qcow2 image, by which the next backup knows what was written since this one.

Each is named after the disk backup that it begins with, or, where libvirt has the VM, as libvirt's
checkpoints are. QEMU keeps it while the VM runs and stores it when it closes the image; after a
crash it is there, but marked as in use, and not to be believed. A program that writes to the image
and knows no bitmaps invalidates them all (an autoclear bit). Adding and removing needs the image
for itself, for some milliseconds.
"""

from __future__ import annotations

import msgspec

from engine.errors import DiskServerBroken
from engine.qemu.process import run_qemu_img
from engine.snapshot.sources import BITMAP_PREFIX


class _Bitmap(msgspec.Struct, frozen=True):
    name: str
    flags: tuple[str, ...] = ()


class _Specific(msgspec.Struct, frozen=True):
    bitmaps: tuple[_Bitmap, ...] = ()


class _FormatSpecific(msgspec.Struct, frozen=True):
    data: _Specific = _Specific()


class _Info(msgspec.Struct, frozen=True):
    """The part of `qemu-img info` that matters here."""

    specific: _FormatSpecific = msgspec.field(name="format-specific", default=_FormatSpecific())


_INFO = msgspec.json.Decoder(_Info)


def bitmap_name(disk_uuid: str) -> str:
    """Of the bitmap that records what is written after this disk backup."""
    return f"{BITMAP_PREFIX}{disk_uuid}"


def bitmaps_of(path: str) -> dict[str, bool]:
    """By name, whether it can be believed. DiskServerRefused, DiskServerLost, DiskServerBroken."""
    said = run_qemu_img(path, "info", "-f", "qcow2", "-U", "--output=json", path)
    try:
        found = _INFO.decode(said).specific.data.bitmaps
    except msgspec.MsgspecError as error:
        raise DiskServerBroken(f"{path}: what qemu-img info said: {error}") from error
    return {bitmap.name: _is_whole(bitmap) for bitmap in found}


def add_bitmap(path: str, name: str) -> None:
    """Records from now on. DiskServerRefused if somebody uses the image, or it can have none."""
    run_qemu_img(path, "bitmap", "--add", "-f", "qcow2", path, name)


def remove_bitmap(path: str, name: str) -> None:
    """DiskServerRefused if somebody uses the image, or there is none."""
    run_qemu_img(path, "bitmap", "--remove", "-f", "qcow2", path, name)


def _is_whole(bitmap: _Bitmap) -> bool:
    """Recording (`auto`) all the time, and stored in full."""
    return "auto" in bitmap.flags and "in-use" not in bitmap.flags
