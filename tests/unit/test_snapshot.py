"""engine.snapshot: snapshots and freezes with real files, commands and file systems."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.errors import Conflict, PoolUnreachable
from engine.snapshot.extents import count_extents
from engine.snapshot.freeze import NO_HOOK, FreezeHook, frozen
from engine.snapshot.snapshot import (
    RESTORES,
    SNAPSHOTS,
    CloneLimits,
    can_clone,
    clear_leftovers,
    take_snapshot,
)
from engine.snapshot.sources import DiskFile, DiskSource
from tests.conftest import LoopFs
from tests.failing_fs import open_below

MIB = 1 << 20
REFLINK_KINDS = ["xfs", "btrfs"]
FS_BYTES = 400 * MIB
PATIENCE_S = 30.0


def content(source: DiskSource) -> bytes:
    buffer = bytearray(source.capacity)
    source.read_into(memoryview(buffer), 0)
    return bytes(buffer)


def volume(pool: Path, name: str = "v", size_bytes: int = 3 * MIB + 7) -> Path:
    path = pool / name
    path.write_bytes(os.urandom(size_bytes))
    return path


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"changed")


def extents(path: Path) -> int:
    with path.open("rb") as file:
        return count_extents(file.fileno())


def map_of(path: Path) -> str:
    """The extents as they are, nothing flushed for that."""
    tools = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    done = subprocess.run(
        ["filefrag", "-v", path], env={"PATH": tools}, check=True, capture_output=True, text=True
    )
    return done.stdout


def recorder(tmp_path: Path, body: str = "") -> tuple[str, Path]:
    """(a command that writes its arguments down, what it wrote)."""
    journal = tmp_path / "journal"
    journal.touch()
    script = tmp_path / "hook"
    script.write_text(f'#!/bin/sh\necho "$@" >> {journal}\n{body}\n')
    script.chmod(0o755)
    return str(script), journal


def lines(journal: Path) -> list[str]:
    return journal.read_text().splitlines()


class TestDirect:
    def test_reads_the_volume_and_guards_it(self, tmp_path: Path) -> None:
        path = volume(tmp_path)
        with take_snapshot([DiskFile("vda", str(path))], NO_HOOK) as snapshot:
            assert snapshot.facts.method == "direct"
            assert content(snapshot.sources["vda"]) == path.read_bytes()
            snapshot.verify_unchanged()
            overwrite(path)
            with pytest.raises(Conflict) as caught:
                snapshot.verify_unchanged()
            assert caught.value.code == "volume_changed"
        assert sorted(os.listdir(tmp_path)) == ["v"]

    def test_the_vm_is_not_frozen_for_it(self, tmp_path: Path) -> None:
        command, journal = recorder(tmp_path)
        path = volume(tmp_path)
        with take_snapshot([DiskFile("vda", str(path))], FreezeHook([command], "u")) as snapshot:
            assert not snapshot.facts.frozen
        assert lines(journal) == []

    def test_missing_volume(self, tmp_path: Path) -> None:
        here = DiskFile("vda", str(volume(tmp_path)))
        with pytest.raises(PoolUnreachable, match="gone"):
            take_snapshot([here, DiskFile("vdb", str(tmp_path / "gone"))], NO_HOOK)
        assert open_below(tmp_path) == []


@pytest.mark.root
@pytest.mark.parametrize("kind", REFLINK_KINDS)
class TestReflink:
    def test_a_clone_does_not_see_later_writes(self, loop_fs: LoopFs, kind: str) -> None:
        pool = loop_fs(kind, FS_BYTES)
        path = volume(pool)
        before = path.read_bytes()
        with take_snapshot([DiskFile("vda", str(path))], NO_HOOK) as snapshot:
            assert snapshot.facts.method == "reflink"
            overwrite(path)
            assert content(snapshot.sources["vda"]) == before
            snapshot.verify_unchanged()
            assert list((pool / SNAPSHOTS).glob("*/*")) == []  # no name left to leak
        assert sorted(os.listdir(pool)) == ["v"]
        assert open_below(pool) == []

    def test_unsynced_writes_are_in_the_clone(self, loop_fs: LoopFs, kind: str) -> None:
        path = volume(loop_fs(kind, FS_BYTES))
        with path.open("r+b", buffering=0) as file:
            file.seek(MIB)
            file.write(b"fresh")
            with take_snapshot([DiskFile("vda", str(path))], NO_HOOK) as snapshot:
                assert content(snapshot.sources["vda"])[MIB : MIB + 5] == b"fresh"

    def test_what_is_dirty_is_flushed_before_the_freeze(self, loop_fs: LoopFs, kind: str) -> None:
        """Else the clone would flush it, while the guest is frozen and its writers stand still."""
        path = loop_fs(kind, FS_BYTES) / "v"
        path.write_bytes(os.urandom(MIB))
        assert "delalloc" in map_of(path)
        seen = []

        def hook(_verb: str) -> str:
            seen.append(map_of(path))
            return ""

        with take_snapshot([DiskFile("vda", str(path))], FreezeHook(["true"], inside=hook)):
            assert len(seen) == 2
        assert "delalloc" not in seen[0]

    def test_all_disks_under_one_freeze(self, loop_fs: LoopFs, tmp_path: Path, kind: str) -> None:
        pool = loop_fs(kind, FS_BYTES)
        command, journal = recorder(tmp_path)
        disks = [DiskFile(name, str(volume(pool, name, MIB))) for name in ("vda", "vdb", "vdc")]
        with take_snapshot(disks, FreezeHook([command, "--now"], "uuid-1")) as snapshot:
            assert snapshot.facts.frozen
            assert snapshot.facts.notes == ()
            for disk in disks:
                assert content(snapshot.sources[disk.target_device]) == Path(disk.path).read_bytes()
        assert lines(journal) == ["--now freeze uuid-1", "--now thaw uuid-1"]

    def test_limits_are_of_all_disks_together(
        self, loop_fs: LoopFs, tmp_path: Path, kind: str
    ) -> None:
        pool = loop_fs(kind, FS_BYTES)
        command, journal = recorder(tmp_path)
        disks = [DiskFile(name, str(volume(pool, name, MIB))) for name in ("vda", "vdb")]
        os.sync()
        count = sum(extents(Path(disk.path)) for disk in disks)
        hook = FreezeHook([command], "uuid-1")
        with take_snapshot(disks, hook, CloneLimits(frozen=count, cloned=count)) as snapshot:
            assert (snapshot.facts.method, snapshot.facts.frozen) == ("reflink", True)
        journal.write_text("")
        with take_snapshot(disks, hook, CloneLimits(frozen=count - 1)) as snapshot:
            assert (snapshot.facts.method, snapshot.facts.frozen) == ("reflink", False)
            assert (
                f"not frozen: {count} extents, {count - 1} are the limit" in snapshot.facts.notes[0]
            )
        with take_snapshot(disks, hook, CloneLimits(cloned=count - 1)) as snapshot:
            assert (snapshot.facts.method, snapshot.facts.frozen) == ("direct", False)
            assert snapshot.facts.notes == (
                f"not cloned: {count} extents, {count - 1} are the limit",
            )
            overwrite(Path(disks[1].path))
            with pytest.raises(Conflict):  # it is guarded then, as on any other file system
                snapshot.verify_unchanged()
        assert lines(journal) == []

    def test_disks_in_different_pools_go_their_own_ways(
        self, loop_fs: LoopFs, tmp_path: Path, kind: str
    ) -> None:
        cloned, read = volume(loop_fs(kind, FS_BYTES)), volume(tmp_path, "w")
        disks = [DiskFile("vda", str(cloned)), DiskFile("vdb", str(read))]
        with take_snapshot(disks, NO_HOOK) as snapshot:
            assert snapshot.facts.methods == {"vda": "reflink", "vdb": "direct"}
            assert snapshot.facts.method == "direct"
            overwrite(cloned)
            snapshot.verify_unchanged()
            overwrite(read)
            with pytest.raises(Conflict):
                snapshot.verify_unchanged()

    def test_many_at_once_in_one_pool(self, loop_fs: LoopFs, kind: str) -> None:
        path = volume(loop_fs(kind, FS_BYTES), size_bytes=4096)
        failures: list[BaseException] = []

        def loop() -> None:
            try:
                for _ in range(30):
                    with take_snapshot([DiskFile("vda", str(path))], NO_HOOK) as snapshot:
                        assert snapshot.facts.method == "reflink"
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        threads = [threading.Thread(target=loop) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []

    def test_probe(self, loop_fs: LoopFs, tmp_path: Path, kind: str) -> None:
        assert can_clone(str(loop_fs(kind, FS_BYTES)))
        assert not can_clone(str(tmp_path / "nowhere"))


@pytest.mark.root
def test_a_nocow_volume_on_btrfs_is_cloned_too(loop_fs: LoopFs) -> None:
    pool = loop_fs("btrfs", FS_BYTES)
    path = pool / "v"
    path.touch()
    subprocess.run(["chattr", "+C", str(path)], check=True)
    path.write_bytes(b"a" * MIB)
    with take_snapshot([DiskFile("vda", str(path))], NO_HOOK) as snapshot:
        assert snapshot.facts.method == "reflink"


class TestFreeze:
    def test_thaw_follows_an_exception(self, tmp_path: Path) -> None:
        command, journal = recorder(tmp_path)
        with pytest.raises(KeyError), frozen(FreezeHook([command], "u")):
            raise KeyError
        assert lines(journal) == ["freeze u", "thaw u"]

    def test_no_hook(self) -> None:
        with frozen(NO_HOOK) as freeze:
            pass
        assert not freeze.held
        assert freeze.notes == []

    @pytest.mark.parametrize(
        "body", ['[ "$1" = thaw ]', 'test "$1" = thaw || exec sleep 60'], ids=["fails", "hangs"]
    )
    def test_a_freeze_that_does_not_work_is_thawed_and_noted(
        self, tmp_path: Path, body: str
    ) -> None:
        command, journal = recorder(tmp_path, body)
        with frozen(FreezeHook([command], "u", timeout_s=0.5)) as freeze:
            assert not freeze.held
        assert lines(journal) == ["freeze u", "thaw u"]
        assert freeze.notes == ["freeze failed: the snapshot is crash-consistent"]

    def test_a_command_that_is_not_there(self, tmp_path: Path) -> None:
        with frozen(FreezeHook([str(tmp_path / "none")], "u")) as freeze:
            assert not freeze.held
        assert any("thaw failed" in note for note in freeze.notes)

    def test_a_thaw_that_fails_is_tried_again(self, tmp_path: Path) -> None:
        once = tmp_path / "once"
        command, journal = recorder(
            tmp_path, f'[ "$1" = freeze ] || mkdir {once} || exit 0; [ "$1" = freeze ]'
        )
        with frozen(FreezeHook([command], "u")) as freeze:
            pass
        assert lines(journal) == ["freeze u", "thaw u", "thaw u"]
        assert freeze.held
        assert freeze.notes == []

    def test_a_thaw_that_fails_for_long_is_tried_until_it_works(self, tmp_path: Path) -> None:
        """As when the hypervisor's daemon died in the freeze, and comes back."""
        back = tmp_path / "back"
        command, journal = recorder(tmp_path, f'[ "$1" = freeze ] || [ -e {back} ]')
        later = threading.Timer(1.5, back.touch)
        later.start()
        with frozen(FreezeHook([command], "u")) as freeze:
            pass
        later.join()
        assert lines(journal)[:5] == ["freeze u", *["thaw u"] * 4]
        tried = len(lines(journal))
        subprocess.run([command, "thaw", "u"], check=True)
        assert len(lines(journal)) == tried + 1  # nobody else tries any more
        assert freeze.notes == ["thawed late: the thaw failed at first"]

    def test_no_shell_reads_the_arguments(self, tmp_path: Path) -> None:
        command, journal = recorder(tmp_path)
        with frozen(FreezeHook([command, "$HOME; echo"], "`id`")):
            pass
        assert lines(journal) == ["$HOME; echo freeze `id`", "$HOME; echo thaw `id`"]

    def test_held_too_long_the_watchdog_thaws(self, tmp_path: Path) -> None:
        command, journal = recorder(tmp_path)
        with frozen(FreezeHook([command], "u", hold_s=0.1)) as freeze:
            assert freeze.held
            wait_for(journal, ["freeze u", "thaw u"])
        assert not freeze.held
        assert "crash-consistent" in freeze.notes[0]

    def test_a_slow_freeze_does_not_count_as_held(self, tmp_path: Path) -> None:
        command, journal = recorder(tmp_path, 'test "$1" = thaw || sleep 0.8')
        with frozen(FreezeHook([command], "u", hold_s=0.5)) as freeze:
            pass
        assert freeze.held
        assert lines(journal) == ["freeze u", "thaw u"]

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_if_we_die_the_watchdog_thaws(self, tmp_path: Path, number: signal.Signals) -> None:
        command, journal = recorder(tmp_path)
        frozen_child = (
            "import sys\n"
            "from engine.snapshot.freeze import FreezeHook, frozen\n"
            f"with frozen(FreezeHook([{command!r}], 'u')):\n"
            "    print('frozen', flush=True)\n"
            "    sys.stdin.read()\n"
        )
        argv = [sys.executable, "-c", frozen_child]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"frozen\n"
            watchdog = only_child_of(child.pid)
            os.kill(watchdog, signal.SIGTERM)  # as a service manager does to the whole group
            assert lines(journal) == ["freeze u"]
            child.send_signal(number)
            child.wait()
        wait_for(journal, ["freeze u", "thaw u"])


def only_child_of(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def wait_for(journal: Path, expected: Sequence[str]) -> None:
    """Until the hook has written these lines; its writer is another process."""
    done = threading.Event()
    for _ in range(int(PATIENCE_S / 0.02)):
        if lines(journal) == list(expected):
            return
        done.wait(0.02)
    raise AssertionError(f"{lines(journal)} instead of {expected}")


_SWAPS = """
import os, sys
place, target, aside = sys.argv[1:]
while True:
    os.rename(place, aside)
    os.symlink(target, place)
    os.unlink(place)
    os.rename(aside, place)
"""


class TestLeftovers:
    def test_files_of_the_killed_go_and_others_stay(self, tmp_path: Path) -> None:
        (tmp_path / SNAPSHOTS / "1").mkdir(parents=True)
        (tmp_path / SNAPSHOTS / "1" / "clone").write_bytes(b"x")
        (tmp_path / RESTORES).mkdir()
        (tmp_path / RESTORES / "aa").write_bytes(b"x")
        (tmp_path / RESTORES / "bb").write_bytes(b"x")
        (tmp_path / "volume").write_bytes(b"x")
        with (tmp_path / RESTORES / "bb").open("rb") as used:
            fcntl.flock(used, fcntl.LOCK_EX)
            assert clear_leftovers(str(tmp_path)) == 2
        assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
            RESTORES,
            f"{RESTORES}/bb",
            "volume",
        ]
        assert clear_leftovers(str(tmp_path)) == 1
        assert sorted(os.listdir(tmp_path)) == ["volume"]

    def test_links_lead_nowhere(self, tmp_path: Path) -> None:
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "file").write_bytes(b"x")
        pool = tmp_path / "pool"
        (pool / RESTORES).mkdir(parents=True)
        (pool / SNAPSHOTS).symlink_to(precious)
        (pool / RESTORES / "file").symlink_to(precious / "file")
        (pool / RESTORES / "directory").symlink_to(precious)
        clear_leftovers(str(pool))
        assert (precious / "file").read_bytes() == b"x"

    def test_links_that_come_meanwhile_lead_nowhere(self, tmp_path: Path) -> None:
        """Whoever may write to the pool puts them there, again and again, until one is followed."""
        pool, precious, aside = (tmp_path / name for name in ("pool", "precious", "aside"))
        for place in (pool / SNAPSHOTS, pool / RESTORES, precious):
            place.mkdir(parents=True)
        files = [precious / str(number) for number in range(3)]
        for file in files:
            file.write_bytes(b"x")
        (pool / SNAPSHOTS / "kept").write_bytes(b"x")
        kept = [str(pool / SNAPSHOTS / "kept")]
        places = map(str, (pool / SNAPSHOTS, precious, aside))
        with subprocess.Popen([sys.executable, "-c", _SWAPS, *places]) as swapper:
            for _ in range(20_000):
                clear_leftovers(str(pool), kept)
            swapper.kill()
        assert [file.exists() for file in files] == [True] * 3

    def test_no_depth_is_too_much(self, tmp_path: Path) -> None:
        (tmp_path / SNAPSHOTS).mkdir()
        fd = os.open(tmp_path / SNAPSHOTS, os.O_RDONLY)
        for _ in range(1500):
            os.mkdir("a", dir_fd=fd)
            below = os.open("a", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(fd)
        try:
            assert clear_leftovers(str(tmp_path)) == 0
        finally:
            subprocess.run(["rm", "-rf", tmp_path / SNAPSHOTS], check=True)  # pytest can't

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert clear_leftovers(str(tmp_path / "none")) == 0


@pytest.mark.root
def test_clone_directory_is_private(loop_fs: LoopFs) -> None:
    pool = loop_fs("xfs", FS_BYTES)
    with take_snapshot([DiskFile("vda", str(volume(pool)))], NO_HOOK):
        for place in pool.glob(f"{SNAPSHOTS}*"):
            assert stat.S_IMODE(place.stat().st_mode) == 0o700
