"""What several tests work on: a point and a domain, a rig, a state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.state import State
from storage.domain.domain import Domain
from storage.point import ClusterLabel, Point
from tests.rig import Rig
from tests.store import CHUNK, cluster, new_point, open_domain


@pytest.fixture
def point(tmp_path: Path) -> Point:
    return new_point(tmp_path)


@pytest.fixture
def label() -> ClusterLabel:
    return cluster()


@pytest.fixture
def domain(point: Point, label: ClusterLabel) -> Domain:
    return open_domain(point, label)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Its chunks are of 64 KiB."""
    with Rig(tmp_path, chunk_size=CHUNK) as made:
        yield made


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    made = State(str(tmp_path / "state"))
    yield made
    made.close()
