"""What earlier versions wrote, this one reads: bit for bit, and without complaint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from storage.check.check import check_point
from storage.point import Point
from tests.golden.make import CLUSTER, HERE, images
from tests.store import Saved, load, open_domain, save

FORMATS = sorted(path.name for path in HERE.glob("format*"))


def test_there_is_a_golden_point_of_each_format() -> None:
    assert FORMATS == ["format1"]


@pytest.fixture(params=FORMATS)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Point:
    """A copy of the golden point: the one in the tree is never opened for writing."""
    path = tmp_path / "point"
    shutil.copytree(HERE / request.param, path)
    return Point.open(str(path))


def test_every_backup_of_the_golden_point_restores(golden: Point) -> None:
    domain = open_domain(golden, CLUSTER, "reader")
    rows = {row.label: row for row in domain.backups()}
    assert set(rows) == {b"full", b"incremental", b"later"}
    for label, image in zip((b"full", b"incremental", b"later"), images(), strict=True):
        row = rows[label]
        assert load(domain, Saved(row.backup, row.disks[0].disk)) == image


def test_the_golden_point_is_clean(golden: Point) -> None:
    report = check_point(golden.path, deep=True)
    assert report.findings == []
    assert (report.backups, report.manifests) == (3, 3)


def test_the_golden_point_takes_new_backups(golden: Point) -> None:
    domain = open_domain(golden, CLUSTER, "writer")
    (full,) = [row for row in domain.backups() if row.label == b"full"]
    image = images()[1]
    saved = save(domain, image, Saved(full.backup, full.disks[0].disk))
    assert load(domain, saved) == image
    assert domain.stats().chunks == len({*_chunks(golden)})


def _chunks(point: Point) -> set[bytes]:
    size = point.chunk_size
    parts = [image[at : at + size] for image in images() for at in range(0, len(image), size)]
    return {part for part in parts if any(part)}


def test_the_layout_is_the_documented_one(golden: Point) -> None:
    root = os.path.join(golden.path, "domains", CLUSTER.cluster_uuid)
    assert sorted(os.listdir(golden.path)) == ["POINT", "domains"]
    assert os.path.exists(os.path.join(root, "log", "00000000", f"{1:016x}"))
    assert os.stat(os.path.join(golden.path, "POINT")).st_size < 512
