"""A point with a domain of ours, and one that another cluster's host makes up."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.domain.domain import Domain
from storage.point import Point
from tests.hostile.forger import Forger
from tests.store import cluster, new_point, open_domain


@pytest.fixture
def point(tmp_path: Path) -> Point:
    return new_point(tmp_path)


@pytest.fixture
def evil(point: Point) -> Forger:
    return Forger(Path(point.path))


@pytest.fixture
def mine(point: Point) -> Domain:
    return open_domain(point, cluster("mine"), "host-9")
