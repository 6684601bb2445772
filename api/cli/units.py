"""Sizes and times as people read and write them. Pure."""

from __future__ import annotations

import re
from datetime import datetime

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGTP]?)(?:iB|B)?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_NAMES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def parse_size(text: str) -> int:
    """Bytes in "20G", "512 MiB", "1.5t" or "1048576"; all powers of 1024. Raises ValueError."""
    match = _SIZE.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 20G")
    return round(float(match[1]) * (1 << 10 * _POWERS[match[2].upper()]))


def size(size_bytes: float) -> str:
    """Three digits and a unit: "1.23 GiB". Whole bytes below 1 KiB."""
    if size_bytes < 1024:
        return f"{int(size_bytes)} B"
    power = 0
    while size_bytes >= 999.5 and power < len(_NAMES) - 1:
        size_bytes /= 1024
        power += 1
    digits = 2 if size_bytes < 9.995 else 1 if size_bytes < 99.95 else 0
    return f"{size_bytes:.{digits}f} {_NAMES[power]}"


def parse_time(text: str) -> int:
    """Unix seconds of "1763900000", "2026-11-23" or "2026-11-23 18:30" (local time)."""
    if text.isdigit():
        return int(text)
    return int(datetime.fromisoformat(text).timestamp())


def time(unix_s: float) -> str:
    """Local time to the second; "-" for never. What no calendar has is shown as the number it is:
    another cluster's backup may say anything."""
    if unix_s <= 0:
        return "-"
    try:
        return datetime.fromtimestamp(unix_s).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return str(unix_s)


def duration(seconds: float) -> str:
    """ "0.4 s", "12 s", "3:05", "2:10:00"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
