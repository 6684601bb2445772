"""A sound point in memory, made once, and copies of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.format import bundles
from tests.damage.site import RECORDS_PER_BUNDLE, Site, make_site


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """A directory where fsync costs nothing; the checker's scratch files are there as well."""
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    path = Path(tempfile.mkdtemp(prefix="vmkeep-damage-", dir=base))
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def _scratch(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(memory))


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "RECORDS_PER_BUNDLE", RECORDS_PER_BUNDLE)


@pytest.fixture(scope="session")
def site(memory: Path) -> Site:
    """Damaged only for as long as a test's `damaged` block lasts."""
    return make_site(memory / "site")


@pytest.fixture
def own(site: Site, memory: Path) -> Iterator[Site]:
    """A copy that a test may do with as it likes."""
    where = memory / "own"
    where.mkdir()
    shutil.copytree(site.path.parent / "views", where / "views")
    yield site.copy(where / "point")
    shutil.rmtree(where)
