"""storage.domain.leftovers: what dead hosts leave goes, and nothing of those that live."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage.domain.domain import Domain
from storage.domain.heartbeats import Observer, beat
from storage.domain.leftovers import Leftovers
from storage.point import ClusterLabel, Point
from tests.store import CHUNK, load, open_domain, save

_CHILD = """
import sys
from storage.domain.heartbeats import beat
from storage.point import ClusterLabel, Point
from tests.store import CHUNK, open_domain, save

label = ClusterLabel(cluster_uuid=sys.argv[2], cluster_name="c", cluster_mode="")
domain = open_domain(Point.open(sys.argv[1]), label, "host-2")
save(domain, bytes(range(256)) * (CHUNK // 256))
beat(domain, 1)
domain.begin("backup")
for name in ("beat-1", "checkpoint-1"):
    domain.fs.close(domain.fs.open_new(domain.paths.host_tmp("host-2") + "/" + name))
epoch = domain.paths.log + "/00000000"
domain.fs.close(domain.fs.open_new(epoch + "/scratch-" + "0" * 32))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def killed(point: Point, label: ClusterLabel) -> subprocess.Popen[str]:
    """Another host, which runs; kill it."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, point.path, label.cluster_uuid],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def end(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.communicate()


def left(domain: Domain) -> set[str]:
    """What is there of host-2, and of nobody."""
    root = Path(domain.paths.root)
    names = {str(path.relative_to(root)) for path in root.rglob("*")}
    return {name for name in names if "host-2" in name or "scratch-" in name}


def test_what_a_killed_host_left_is_cleared(domain: Domain, killed: subprocess.Popen[str]) -> None:
    """When it has been silent for the patience, and not before; what it committed stays."""
    end(killed)
    os.mkdir(f"{domain.paths.views}/host-2.unfinished")
    beat(domain, 1)
    observer, leftovers = Observer(patience_s=600), Leftovers(patience_s=600)
    before = left(domain)
    assert {name.partition("/")[0] for name in before} == {"hosts", "log", "tmp", "views"}
    for now_s in (0.0, 599.0):
        assert observer.end_dead_sessions(domain, now_s) == 0
        assert leftovers.clear(domain, now_s) == 0
    assert left(domain) == before
    assert leftovers.clear(domain, 600.0) == 0  # its session is not ended yet
    assert observer.end_dead_sessions(domain, 600.0) == 1
    assert leftovers.clear(domain, 600.0) == 1
    assert left(domain) == set()
    assert leftovers.clear(domain, 1e9) == 0
    assert os.path.exists(f"{domain.paths.hosts}/{domain.host}")
    (backup,) = domain.backups()
    assert domain.disk_map(backup.disks[0].disk).capacity == CHUNK


def test_a_host_that_lives_keeps_its_view(domain: Domain, killed: subprocess.Popen[str]) -> None:
    """Though its heartbeats don't come through and its session was ended, as on a full point."""
    leftovers = Leftovers(patience_s=600)
    Observer(patience_s=0).end_dead_sessions(domain, 0.0)
    observer = Observer(patience_s=600)
    observer.end_dead_sessions(domain, 0.0)
    observer.end_dead_sessions(domain, 600.0)
    leftovers.clear(domain, 0.0)
    assert leftovers.clear(domain, 600.0) == 0
    assert {"hosts/host-2", "views/host-2", "views/host-2/data.mdb"} <= left(domain)
    end(killed)
    assert leftovers.clear(domain, 601.0) == 1
    assert left(domain) == set()


def test_a_host_whose_heart_beats_keeps_everything(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    other = open_domain(point, label, "host-2")
    image = os.urandom(CHUNK)
    saved = save(other, image)
    leftovers = Leftovers(patience_s=600)
    for counter in range(5):
        beat(other, counter)
        assert leftovers.clear(domain, counter * 599.0) == 0
    assert {"hosts/host-2", "tmp/host-host-2", "views/host-2"} <= left(domain)
    assert load(other, saved) == image
    other.close()


def test_taken_for_gone_it_goes_on(point: Point, label: ClusterLabel, domain: Domain) -> None:
    """A host that was cleared while it lived (its view is elsewhere) loses nothing by it."""
    other = open_domain(point, label, "host-2")
    kept = save(other, os.urandom(CHUNK))
    beat(other, 1)
    domain.fs.rename(f"{domain.paths.views}/host-2", f"{point.path}/elsewhere")
    leftovers = Leftovers(patience_s=600)
    leftovers.clear(domain, 0.0)
    assert leftovers.clear(domain, 600.0) == 1
    assert left(domain) == set()
    image = os.urandom(CHUNK)
    saved = save(other, image, kept)
    beat(other, 2)
    assert load(other, saved) == image
    other.forget([saved.backup, kept.backup])
    assert domain.refresh()
    assert domain.backups() == []
    other.close()


def test_what_is_planted_is_not_followed(domain: Domain, tmp_path: Path) -> None:
    """A name in views/ that leads elsewhere, or a fifo for a heartbeat."""
    away = tmp_path / "away"
    away.mkdir()
    (away / "precious").write_bytes(b"x")
    os.symlink(away, f"{domain.paths.views}/evil")
    os.symlink(away, f"{domain.paths.tmp}/host-evil")
    os.mkfifo(f"{domain.paths.hosts}/pipe")
    leftovers = Leftovers(patience_s=1)
    leftovers.clear(domain, 0.0)
    leftovers.clear(domain, 2.0)
    assert (away / "precious").exists()
