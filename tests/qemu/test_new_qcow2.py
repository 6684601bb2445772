"""engine.qemu.new_qcow2: a restore's target, whole or not there."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from engine.errors import Conflict, EngineError, PoolFull
from engine.qemu.new_qcow2 import NewQcow2
from engine.restore.new_volume import NewVolume
from tests.conftest import LoopFs
from tests.qemu.images import MIB, content, qemu_img
from tests.rig import random_bytes


def target(path: Path) -> NewQcow2:
    return NewQcow2(NewVolume(str(path)), str(path))


def names(pool: Path) -> list[str]:
    return sorted(path.name for path in pool.iterdir())


def fill(volume: NewQcow2, size_bytes: int) -> None:
    for at in range(0, size_bytes, MIB):
        volume.write(memoryview(random_bytes(MIB, at)), at)
    volume.make_durable()


def test_written_by_threads_and_whole_once_it_has_its_name(tmp_path: Path) -> None:
    expected = bytearray(64 * MIB)
    with target(tmp_path / "v") as volume:
        volume.resize(64 * MIB)

        def write(number: int) -> None:
            for at in range(number * MIB, 64 * MIB, 8 * MIB):
                piece = random_bytes(MIB, at)
                expected[at : at + MIB] = piece
                volume.write(memoryview(piece), at)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        volume.make_durable()
        assert names(tmp_path) == [".vmkeep-restores"]
        volume.name()
    assert names(tmp_path) == ["v"]
    qemu_img("check", "-q", "-f", "qcow2", tmp_path / "v")
    assert content(tmp_path / "v") == expected
    assert (tmp_path / "v").stat().st_blocks * 512 < 26 * MIB


def test_nothing_stays_of_one_that_is_given_up(tmp_path: Path) -> None:
    with target(tmp_path / "v") as volume:
        volume.resize(16 * MIB)
        volume.write(memoryview(b"x" * MIB), 0)
    assert names(tmp_path) == []


def test_a_name_that_is_taken_stays_what_it_was(tmp_path: Path) -> None:
    with target(tmp_path / "v") as volume:
        volume.resize(16 * MIB)
        volume.make_durable()
        (tmp_path / "v").write_bytes(b"theirs")
        with pytest.raises(Conflict, match="already"):
            volume.name()
        volume.unname()
    assert (tmp_path / "v").read_bytes() == b"theirs"


def test_a_disk_of_a_size_that_no_image_has(tmp_path: Path) -> None:
    with target(tmp_path / "v") as volume, pytest.raises(EngineError, match=r"v: .*qemu-img"):
        volume.resize(1 << 62)
    assert names(tmp_path) == []


def test_a_full_pool_is_named(loop_fs: LoopFs) -> None:
    pool = loop_fs("ext4", 32 * MIB)
    before = names(pool)
    with target(pool / "v") as volume:
        volume.resize(64 * MIB)
        with pytest.raises(PoolFull):
            fill(volume, 64 * MIB)
    assert names(pool) == before
