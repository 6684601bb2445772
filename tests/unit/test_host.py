"""engine.host: one process for a data directory, and an id that stays."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from engine.errors import AlreadyRunning, ConfigInvalid
from engine.host import Host
from storage.errors import Damaged, StorageError


def test_the_id_is_made_once(tmp_path: Path) -> None:
    host = Host(str(tmp_path / "data"))
    first = host.id
    host.close()
    again = Host(str(tmp_path / "data"))
    assert again.id == first == str(uuid.UUID(first))
    again.close()
    other = Host(str(tmp_path / "other"))
    assert other.id != first
    other.close()


def test_a_second_one_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    host = Host(str(tmp_path))
    with pytest.raises(AlreadyRunning):
        Host(str(tmp_path))
    code = f"from engine.host import Host; Host({str(tmp_path)!r})"
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "AlreadyRunning" in other.stderr
    host.close()
    host.close()
    Host(str(tmp_path)).close()


def test_a_spoilt_id_is_damage_and_lets_go_of_the_lock(tmp_path: Path) -> None:
    Host(str(tmp_path)).close()
    kept = (tmp_path / "host").read_text()
    for spoilt in (b"nobody\n", b"\xff\xfe", b""):
        (tmp_path / "host").write_bytes(spoilt)
        with pytest.raises(Damaged):
            Host(str(tmp_path))
    (tmp_path / "host").write_text(kept)
    Host(str(tmp_path)).close()


def test_a_directory_that_can_not_be_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        Host(str(tmp_path / "file" / "data"))


def test_a_path_that_the_state_could_not_hold_is_refused(tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(ConfigInvalid, match="Unicode"):
        Host(odd)
    assert os.listdir(tmp_path) == []
