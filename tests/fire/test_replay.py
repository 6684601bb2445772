"""A disk as a power failure at any flush could have left it. See replay.py."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

from storage.errors import Damaged
from tests.fire.plug import Broken
from tests.fire.replay import Entry, Replay, entries, mounted, replayed
from tests.nfs.kit import NoKit

WORDS = 6
SECTOR = 512


def _entry(sector: int, flags: int, data: bytes = b"", mark: bytes = b"") -> bytes:
    sectors = len(data) // SECTOR
    head = struct.pack("<QQQQ", sector, sectors, flags, len(mark)) + mark
    return head.ljust(SECTOR, b"\0") + data


def _log(path: Path, *logged: bytes) -> Path:
    head = struct.pack("<QQQI", 0x6A736677736872, 1, len(logged), SECTOR)
    path.write_bytes(head.ljust(SECTOR, b"\0") + b"".join(logged))
    return path


def test_a_log_of_writes_is_read(tmp_path: Path) -> None:
    one, two = bytes([1]) * SECTOR, bytes([2]) * (3 * SECTOR)
    log = _log(
        tmp_path / "log",
        _entry(7, 0, one),
        _entry(9, 1),
        _entry(0, 8, mark=b"1"),
        struct.pack("<QQQQ", 5, 100, 4, 0).ljust(SECTOR, b"\0"),
        _entry(0, 8, mark=b"dm-log-writes-end"),
        _entry(8, 3, two),
    )
    assert list(entries(log)) == [
        Entry(7 * SECTOR, one, False),
        Entry(9 * SECTOR, b"", True),
        Entry(0, b"", False, 1),
        Entry(8 * SECTOR, two, True),
    ]
    (tmp_path / "other").write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="no log of writes"):
        list(entries(tmp_path / "other"))


def test_a_state_is_judged_at_each_end_and_before_each_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4 * SECTOR))
    told = [("cluster", "c"), ("forgotten", ""), ("saving", "1"), ("saved", "u")]
    seen: list[tuple[int, set[str]]] = []
    monkeypatch.setattr(
        Replay,
        "judge",
        lambda self: seen.append((disk.read_bytes().count(b"x"), set(self.told.saved))),
    )
    log = _log(
        tmp_path / "log",
        _entry(0, 1, b"x" * SECTOR),  # there is no point yet
        _entry(0, 8, mark=b"1"),
        _entry(0, 8, mark=b"2"),
        _entry(1, 0, b"x" * SECTOR),
        _entry(2, 2, b"x" * SECTOR),
        _entry(0, 8, mark=b"3"),
        _entry(3, 0, b"x" * SECTOR),  # never flushed
    )
    Replay(tmp_path, disk, [json.dumps(word) for word in told]).run(log)
    assert seen == [(SECTOR, set()), (3 * SECTOR, {"u"})]


@pytest.mark.root
@pytest.mark.slow
def test_a_power_failure_at_any_flush(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root (loop mounts)")
    try:
        counts = replayed(tmp_path, "ext4", WORDS, 1)
    except NoKit as error:
        pytest.skip(str(error))
    print(dict(counts))
    assert counts["acknowledged"] >= 1
    assert counts["crashes"] > 10 * WORDS
    assert counts["restored"] > 0
    _the_same_disk_with_records_lost_is_found_out(tmp_path)


def _the_same_disk_with_records_lost_is_found_out(tmp_path: Path) -> None:
    (again := tmp_path / "again").mkdir()
    told = (tmp_path / "told").read_text().splitlines()
    (tmp_path / "copy").rename(again / "copy")
    last = Replay(again, again / "copy", told)
    for word in told[1:]:
        last.told.hear(word.encode())
    with mounted(again / "copy", again / "place"):
        for record in sorted((again / "place").glob("point/domains/*/log/*/*"))[2:]:
            record.unlink()
        subprocess.run(["sync", "-f", again / "place"], check=True)
        with pytest.raises((Broken, Damaged)):
            last.prove()
