"""Fixtures: for a module a libvirt host and a VM on it, for all of them libvirtd's cache."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.libvirt.host import Host
from tests.libvirt.lab import Lab, make_lab
from tests.libvirt.site import rig_on
from tests.nfs.kit import Kit, NoKit, make_kit


@pytest.fixture(scope="session")
def kit() -> Kit:
    if os.geteuid() != 0:
        pytest.skip("needs root (libvirtd runs as another user)")
    if importlib.util.find_spec("libvirt") is None:
        pytest.skip("needs libvirt-python (pip install -r requirements/libvirt.txt)")
    try:
        return make_kit()
    except NoKit as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cache() -> Iterator[Path]:
    """What libvirtd found out about QEMU: seconds, the first time."""
    place = Path("/tmp") / f"vkcache{os.getpid()}"
    place.mkdir(mode=0o755)
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def host(kit: Kit, cache: Path) -> Iterator[Host]:
    with contextlib.closing(Host(kit, cache)) as made:
        yield made


@pytest.fixture(scope="module")
def lab(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with rig_on(tmp_path_factory.mktemp("site") / "data", host) as rig:
        made = make_lab(host, rig)
        yield made
        made.guest.close()
