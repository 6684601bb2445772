"""Sizes, times, disks and directories on the command line. click shows what BadParameter says."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import click

from api.cli import units

DISK_METAVAR = "DEVICE=POOL:VOLUME[:SIZE][:USD_TYPE]"


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """One --disk. `capacity` 0 and `usd_type` "" when not given; `pool` may be a name."""

    target_device: str
    pool: str
    volume: str
    capacity: int = 0
    usd_type: str = ""


class OwnDirectory(click.Path):
    """A directory that is made when it is not there. Empty, as of a variable that is not set, it
    would be the one that the command happens to be run in."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str | bytes | os.PathLike[str]:
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


def disk(text: str) -> DiskSpec:
    """`sda=default:web01-root:20G:SSD`. Size and type may be left out."""
    device, _, place = text.partition("=")
    pool, _, rest = place.partition(":")
    volume, *options = rest.split(":")
    if not (device and pool and volume):
        raise click.BadParameter(f"{text!r} is not {DISK_METAVAR}")
    capacity, usd_type = 0, ""
    for option in options:
        if option[:1].isdigit() and not capacity:
            capacity = size(option)
        elif option and not usd_type:
            usd_type = option
        else:
            raise click.BadParameter(f"{text!r} has too many parts for {DISK_METAVAR}")
    return DiskSpec(device, pool, volume, capacity, usd_type)


def size(text: str) -> int:
    """Bytes, of a size such as 20G."""
    try:
        return units.parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def time(text: str | int) -> int:
    """Unix seconds, of a time such as 2026-11-23 18:30."""
    try:
        return units.parse_time(str(text))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a time such as 2026-11-23 18:30") from error
