"""The benchmarks' disk images: the same bytes each time, and as much changed as they say."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from bench.ageing import Churn, age, rebuilt
from bench.corpora import BLOCK, KIB, MIB, copied, difference, rows, scribble
from bench.disks import check_ext4, make_ext4, missing_tools

SIZE = 32 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    if missing_tools():
        pytest.skip("needs e2fsprogs")
    files, chance = tmp_path / "files", random.Random(1)
    for folder in ("usr", "usr/bin", "var"):
        (files / folder).mkdir(parents=True, exist_ok=True)
        for number in range(20):
            content = rows(chance, chance.randrange(1, 300 * KIB))
            (files / folder / f"file-{number}.dat").write_bytes(content)
    path = tmp_path / "a.raw"
    make_ext4(path, SIZE, files, seed=1)
    return path


def aged(image: Path, name: str, seed: int) -> Path:
    target = copied(image, image.with_name(name))
    scratch = image.with_name(f"{name}.scratch")
    scratch.mkdir()
    churn = Churn(deleted=0.02, upgraded=0.04, added=0.02, edited=0.01)
    age(target, churn, random.Random(seed), scratch)
    shutil.rmtree(scratch)
    return target


def test_a_day_later_is_the_same_day_each_time_and_sound(image: Path) -> None:
    one, other = aged(image, "b.raw", 2), aged(image, "c.raw", 2)
    assert one.read_bytes() == other.read_bytes()
    assert one.read_bytes() != aged(image, "d.raw", 3).read_bytes()
    check_ext4(one)


def test_a_day_changes_about_what_it_should(image: Path) -> None:
    """Upgrades, additions and edits change blocks; deletions only the file system's own."""
    found = difference(image, aged(image, "b.raw", 2))
    assert 0.05 * SIZE < found.changed_bytes < 0.12 * SIZE
    assert 0 < found.compressed_bytes < found.changed_bytes


def test_a_new_build_has_the_old_content_somewhere_else() -> None:
    content = rows(random.Random(1), 200 * KIB)
    new = rebuilt(content, random.Random(2))
    assert len(content) < len(new) < len(content) * 1.01
    assert content[-4 * KIB :] in new
    assert content[64 * KIB : 68 * KIB] != new[64 * KIB : 68 * KIB]


def test_the_difference_counts_blocks_that_were_written(tmp_path: Path) -> None:
    old = tmp_path / "old.raw"
    old.write_bytes(rows(random.Random(1), 4 * MIB))
    new = copied(old, tmp_path / "new.raw")
    assert difference(old, new).changed_bytes == 0
    scribble(new, random.Random(2), writes=10)
    found = difference(old, new)
    assert found.changed_bytes == 10 * BLOCK
    assert 10 * BLOCK * 0.3 < found.compressed_bytes < 10 * BLOCK * 0.7


def test_rows_compress_as_a_database_does_and_are_never_the_same() -> None:
    chance = random.Random(1)
    assert len(rows(chance, 5000)) == 5000
    assert rows(chance, 5000) != rows(chance, 5000)
