"""In the VM: a backup point on a disk of which sectors go bad, one kind of file after another.

`python -m tests.fire.sectors RESULTS KIND CHECK…`: the disk is /dev/vda, below device mapper's
linear and error targets, so that the block layer says what can't be read: to a read, a write, and
to whoever looks through a mapping. A line of JSON on each check goes to RESULTS. As root, inside
the VM only. See test_sectors.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from api.client import ServerUnreachable
from bench.service import Service
from bench.witness import Witness
from engine.config import Config, Limits, PointConfig
from engine.model import Backup, Vm
from engine.service import Engine
from engine.snapshot.extents import extent_map
from storage.check.check import check_point
from storage.files.fs import OsFs
from storage.format.packs import read_footer
from tests.engine_rig import PATIENCE_S, EngineRig
from tests.nfs.guest.run import Result
from tests.rig import random_bytes, write_at

DEVICE = "/dev/vda"
NAME = "spoilt"
PLACE = Path("/mnt") / NAME
DATA = Path("/dev/shm/data")
GROUP = Path("/sys/fs/cgroup/spoilt")
SECTOR = 512
MIB = 1 << 20
CONFIG = Config(
    limits=Limits(point_reserve_bytes=0),
    points=(PointConfig("p", str(PLACE)),),
)


class Disk:
    """A disk with a file system, mounted at PLACE. What `spoil` is told can't be read any more."""

    def __init__(self, kind: str) -> None:
        _run("modprobe", "-a", kind, "dm-mod")
        self._sectors = int(_run("blockdev", "--getsz", DEVICE))
        self._bad: set[int] = set()
        self._kept: list[Path] = []
        _run("dmsetup", "create", NAME, "--table", self._table())
        _run("dmsetup", "mknodes")  # there is no udev
        PLACE.mkdir(parents=True)
        _run("mount", "-t", kind, f"/dev/mapper/{NAME}", str(PLACE))

    def spoil(self, path: Path, *offsets: int) -> None:
        """The sectors that these bytes of the file lie in. Nothing of it is remembered either.

        A drive would give them spare ones when they are written. These fail then, too; so a second
        name keeps them from being used for something else.
        """
        self._kept.append(PLACE / f"kept-{len(self._kept)}")
        os.link(path, self._kept[-1])
        with path.open("rb") as file:
            os.fsync(file.fileno())
            extents = extent_map(file.fileno(), path.stat().st_size)
        for offset in offsets:
            (extent,) = [one for one in extents if one.start <= offset < one.end]
            self._bad.add((extent.physical + offset - extent.start) // SECTOR)
        self._load()

    def mend(self) -> None:
        """All can be read again, and be written."""
        self._bad.clear()
        self._load()
        for path in self._kept:
            path.unlink()
        self._kept.clear()

    def _load(self) -> None:
        _run("dmsetup", "load", NAME, "--table", self._table())
        _run("dmsetup", "suspend", NAME)
        _run("dmsetup", "resume", NAME)
        forget_cached()

    def _table(self) -> str:
        lines, start = [], 0
        for bad in [*sorted(self._bad), self._sectors]:
            if bad > start:
                lines.append(f"{start} {bad - start} linear {DEVICE} {start}")
            if bad < self._sectors:
                lines.append(f"{bad} 1 error")
            start = bad + 1
        return "\n".join(lines)


def forget_cached() -> None:
    """What the kernel has in memory of files, but for what a process has mapped and looked at."""
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")


class Log(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Bench:
    """A service on the disk with two VMs: `web` was backed up twice, `other` once."""

    def __init__(self, kind: str) -> None:
        self.disk = Disk(kind)
        self.rig = EngineRig(DATA, CONFIG)
        self.web = self.rig.make_vm("web", random_bytes(5 * MIB, 1))
        self.full = self._backed_up(self.web)
        write_at(self.rig.volume(self.web.disks[0]), 0, random_bytes(MIB, 2))
        self.later = self._backed_up(self.web)
        other = self.rig.make_vm("other", random_bytes(3 * MIB, 3))
        self.other = self._backed_up(other)
        self._restored = 0
        self._log = Log()
        logging.getLogger().addHandler(self._log)

    def _backed_up(self, vm: Vm) -> tuple[Backup, bytes]:
        backup = self.rig.back_up(vm)
        return backup, self.rig.volume(vm.disks[0]).read_bytes()

    def whole(self, *wanted: tuple[Backup, bytes]) -> None:
        """These backups, or all that there are, come back bit for bit."""
        for backup, content in wanted or (self.full, self.later, self.other):
            self._restored += 1
            name = f"copy-{self._restored}"
            vm, job = self.rig.ask_restore(backup, name)
            self.rig.succeed(job)
            volume = self.rig.volume(self.rig.engine.vm(vm).disks[0])
            assert volume.read_bytes() == content, backup.uuid
            volume.unlink()

    def verified(self) -> tuple[str, list[str]]:
        """(state, what it says) of a deep verify."""
        job = self.rig.engine.start_maintenance("verify", self.rig.point_uuid, deep=True)
        ended = self.rig.ended(job)
        return ended.state, [ended.error, *ended.result]

    def files(self, kind: str) -> list[Path]:
        """The point's files of a kind, oldest first."""
        found = [path for path in PLACE.glob(f"domains/*/{kind}/*/*") if path.is_file()]
        return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path))

    @property
    def view(self) -> Path:
        (found,) = PLACE.glob("domains/*/views/*/data.mdb")
        return found

    def require_said(self, event: str) -> None:
        """The service logged it, since this was last asked."""
        lines, self._log.lines = self._log.lines, []
        assert any(line.startswith(event) for line in lines), lines

    def start(self) -> None:
        self.rig.engine = Engine.start(str(DATA), CONFIG)

    def stop(self) -> None:
        self.rig.engine.stop(PATIENCE_S)

    def point_state(self) -> tuple[str, str]:
        """(state, what was said last) after a look at the point."""
        self.rig.core.points.look_again(self.rig.point_uuid, PATIENCE_S)
        (point,) = self.rig.engine.points()
        return point.state, point.last_error


def pack(bench: Bench) -> None:
    """Named by who restores and who verifies; the rest is had; a full backup heals it."""
    backup, content = bench.full
    path = bench.files("packs")[0]
    entry = read_footer(OsFs(), str(path))[1][3]
    place = f"{path} at {entry.offset}"
    domain = bench.rig.core.points.domain(bench.rig.point_uuid, bench.rig.cluster_uuid)
    chunks = [content[at : at + MIB] for at in range(0, len(content), MIB)]
    at = [domain.hasher.full(chunk) for chunk in chunks].index(entry.chunk_id) * MIB
    bench.disk.spoil(path, entry.offset + MIB // 2)  # far from the frames beside it: pages are read
    failed = bench.rig.ended(bench.rig.ask_restore(backup, "not")[1])
    assert failed.state == "failed"
    assert place in failed.error, failed.error
    made, job = bench.rig.ask_restore(backup, "left", allow_damaged=True)
    assert bench.rig.succeed(job).result[1] == f"sda: missing offset={at} length={MIB}"
    left = bench.rig.volume(bench.rig.engine.vm(made).disks[0]).read_bytes()
    assert left == content[:at] + bytes(MIB) + content[at + MIB :]
    bench.whole(bench.other)
    state, lines = bench.verified()
    assert state == "failed"
    (line,) = [line for line in lines if place in line and line.startswith("chunk: ")]
    assert backup.uuid in line
    assert bench.later[0].uuid in line
    assert bench.other[0].uuid not in line
    assert any(backup.uuid in line and line.endswith(f"{at}+{MIB}") for line in lines), lines
    bench.rig.back_up(bench.web, full=True)
    bench.whole()
    assert bench.verified()[0] == "succeeded"


def manifest(bench: Bench) -> None:
    """Named, and written anew from the view; then nothing is wrong any more."""
    path = bench.files("manifests")[1]
    bench.disk.spoil(path, 80)
    state, lines = bench.verified()
    assert state == "failed"
    (line,) = [line for line in lines if line.startswith(f"manifest: {path}")]
    assert bench.later[0].uuid in line
    assert bench.full[0].uuid not in line
    assert "manifests of 1 disks written anew from the view" in lines
    assert bench.verified()[0] == "succeeded"
    bench.whole()


def view(bench: Bench) -> None:
    """One that was closed: the start finds out that it is not what it was, and makes it anew."""
    bench.stop()
    bench.disk.spoil(bench.view, *_a_byte_of_each_page(bench.view))
    bench.start()
    bench.whole()
    bench.require_said("view_discarded")


def _a_byte_of_each_page(path: Path) -> range:
    return range(0, path.stat().st_size, 4096)


def view_in_use(bench: Bench) -> None:
    """Looked at through its mapping it ends the service, by SIGBUS; the next start is as any."""
    bench.stop()
    config = DATA.with_suffix(".toml")
    config.write_text(f'[[points]]\nname = "p"\npath = "{PLACE}"\n')
    with _memory_of_its_own(), Service(DATA, "--config", str(config)) as service:
        with closing(Witness(service.url, DATA, "before")) as witness:
            bench.disk.spoil(bench.view, *_a_byte_of_each_page(bench.view))
            _let_go_of_what_is_mapped()
            with contextlib.suppress(ServerUnreachable):
                witness.start_restore(bench.other[0].uuid)
        assert service.stop(signal.SIGCONT) == -signal.SIGBUS
    bench.start()
    bench.whole()
    bench.require_said("view_discarded")


@contextmanager
def _memory_of_its_own() -> Iterator[None]:
    """We, and those that we start, have our memory counted by itself inside the block."""
    if not GROUP.exists():
        _run("mount", "-t", "cgroup2", "none", str(GROUP.parent))
        (GROUP.parent / "cgroup.subtree_control").write_text("+memory")
        GROUP.mkdir()
    (GROUP / "cgroup.procs").write_text("0")
    try:
        yield
    finally:
        (GROUP.parent / "cgroup.procs").write_text("0")


def _let_go_of_what_is_mapped() -> None:
    """As when memory is short: also pages that a process has looked at go, and are read again."""
    with contextlib.suppress(OSError):  # EAGAIN: it was not as much as that
        (GROUP / "memory.reclaim").write_text("1G")


def record(bench: Bench) -> None:
    """Who has folded it goes on. Without a view the domain can't be opened, and that is said."""
    bench.stop()
    path = bench.files("log")[1]
    bench.disk.spoil(path, 20)
    report = check_point(str(PLACE), deep=True)
    assert [str(path) in f"{one.path} {one.detail}" for one in report.findings].count(True) == 1
    bench.start()
    bench.whole()
    bench.rig.back_up(bench.web)
    bench.stop()
    shutil.rmtree(bench.view.parent)
    bench.start()
    state, said = bench.point_state()
    assert state == "damaged"
    assert f"{path} at 0: can't be read" in said, said
    bench.stop()
    bench.disk.mend()
    bench.start()
    bench.whole()


def afterwards(bench: Bench) -> None:
    """What was read in the end was never changed: a gc, and nothing is wrong with anything."""
    bench.rig.succeed(bench.rig.engine.start_maintenance("gc", bench.rig.point_uuid, deep=False))
    assert bench.verified()[0] == "succeeded"
    bench.whole()
    bench.stop()
    assert check_point(str(PLACE), deep=True).findings == []


# One after the other on the same disk. Who starts a real service takes long in the machine.
ALL = (pack, manifest, view, view_in_use, record, afterwards)
SHORT = tuple(check for check in ALL if check is not view_in_use)


def main(results: Path, kind: str, *names: str) -> None:
    bench = Bench(kind)
    print(f"[spoilt] {Path('/proc/uptime').read_text().split()[0]} s", flush=True)
    for check in [check for check in ALL if check.__name__ in names]:
        began_s = time.monotonic()
        trace = ""
        try:
            check(bench)
        except Exception:  # noqa: BLE001 - whatever it is, it is the result
            trace = traceback.format_exc()
        result = Result(check.__name__, round(time.monotonic() - began_s, 1), [], trace)
        print(f"[check] {result.name}: {result.seconds} s {trace}", flush=True)
        with results.open("ab") as file:
            file.write(msgspec.json.encode(result) + b"\n")
        if trace:
            break


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
