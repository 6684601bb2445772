"""A point, and a domain on it, for the tests of storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.domain import Domain
from storage.point import ClusterLabel, Point
from tests.store import cluster, new_point, open_domain


@pytest.fixture
def point(tmp_path: Path) -> Point:
    return new_point(tmp_path)


@pytest.fixture
def label() -> ClusterLabel:
    return cluster()


@pytest.fixture
def domain(point: Point, label: ClusterLabel) -> Domain:
    return open_domain(point, label)
