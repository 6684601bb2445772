"""The state can't be written just when something ends; when it can, all is as it should be."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine import amends
from engine.jobs.jobs import Jobs
from engine.model import BACKUP_DONE, BACKUP_RUNNING
from engine.points.distrust import remember_distrusted
from storage.domain.domain import Domain
from storage.errors import PointFull
from storage.lmdb_env.kv import Store, WriteTxn
from storage.view.listing import BackupRow
from tests.engine_rig import ANYWHERE, PATIENCE_S, EngineRig, disk_bytes

MIB = 1 << 20


class Disk:
    """The data directory's."""

    full = False


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made, write = Disk(), Store.write

    @contextlib.contextmanager
    def unless_full(store: Store) -> Iterator[WriteTxn]:
        if made.full:
            raise PointFull("no room for the state")
        with write(store) as txn:
            yield txn

    monkeypatch.setattr(Store, "write", unless_full)
    monkeypatch.setattr(amends, "AGAIN_S", 0.02)
    return made


@pytest.fixture
def rig(tmp_path: Path, disk: Disk) -> Iterator[EngineRig]:  # noqa: ARG001
    with EngineRig(tmp_path / "data") as made:
        yield made


def filled_before_its_end(disk: Disk, job: str) -> AbstractContextManager[None]:
    """Jobs of this kind (the module's name) find the disk full when they end."""

    def fill(*args: Any) -> None:
        disk.full = True
        remember_distrusted(*args)

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"engine.{job}.remember_distrusted", fill)
            yield

    return patched()


def eventually(seen: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not seen():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_backup_whose_end_could_not_be_noted(rig: EngineRig, disk: Disk) -> None:
    """It is on its point, and so it is done; its VM is not busy until the next start."""
    content = disk_bytes(MIB, 1)
    vm = rig.make_vm("web", content)
    with filled_before_its_end(disk, "backup.backup_job"):
        uuid, job = rig.ask_backup(vm)
        assert rig.ended(job).error == "no room for the state"
    assert rig.engine.backup(ANYWHERE, uuid).status == BACKUP_RUNNING
    assert rig.engine.vm(vm.uuid).action == "backing_up"
    disk.full = False
    eventually(lambda: not rig.engine.vm(vm.uuid).action)
    made = rig.engine.backup(ANYWHERE, uuid)
    assert made.status == BACKUP_DONE
    assert rig.back_up(vm).parent == uuid
    assert rig.restore(made, "copy") == [content]


def test_a_restore_whose_end_could_not_be_noted(rig: EngineRig, disk: Disk) -> None:
    content = disk_bytes(MIB, 1)
    made = rig.back_up(rig.make_vm("web", content))
    with filled_before_its_end(disk, "restore.restore_job"):
        vm_uuid, job = rig.ask_restore(made, "copy")
        assert rig.ended(job).state == "failed"
    assert rig.engine.vm(vm_uuid).action == "restoring"
    disk.full = False
    eventually(lambda: not rig.engine.vm(vm_uuid).action)
    vm = rig.engine.vm(vm_uuid)
    assert vm.state == "stopped"
    assert rig.volume(vm.disks[0]).read_bytes() == content


def test_what_could_not_begin_leaves_nothing(
    rig: EngineRig, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = rig.make_vm("web", disk_bytes(MIB, 1))
    made = rig.back_up(vm)

    def fill(*_: object) -> None:
        disk.full = True
        raise PointFull("no room for the job")

    for ask in (partial(rig.ask_backup, vm), partial(rig.ask_restore, made, "copy")):
        with monkeypatch.context() as patch:
            patch.setattr(Jobs, "submit", fill)
            with pytest.raises(PointFull):
                ask()
        disk.full = False
        eventually(lambda: [one.action for one in rig.engine.vms(ANYWHERE)] == [""])
        eventually(lambda: rig.listed() == [made.uuid])
    assert rig.restore(made, "copy") == [disk_bytes(MIB, 1)]


def test_an_end_whose_point_hangs_holds_up_no_other(
    rig: EngineRig, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its view has to be made anew, on a medium that does not answer."""
    vms = [rig.make_vm(name, disk_bytes(MIB, 1)) for name in ("a", "b")]
    together, answers, asked = threading.Barrier(2), threading.Event(), list[str]()
    rows_of = Domain.rows_of

    def fill(*args: Any) -> None:
        together.wait(PATIENCE_S)
        disk.full = True
        remember_distrusted(*args)

    def first_hangs(domain: Domain, wanted: Collection[str]) -> list[BackupRow]:
        asked.extend(wanted)
        if wanted == asked[:1]:
            answers.wait(PATIENCE_S)
        return rows_of(domain, wanted)

    with monkeypatch.context() as patch:
        patch.setattr("engine.backup.backup_job.remember_distrusted", fill)
        made = [rig.ask_backup(vm) for vm in vms]
        assert {rig.ended(job).state for _, job in made} == {"failed"}
    monkeypatch.setattr(rig.core.points, "look_again", lambda *_: None)  # nobody else asks
    monkeypatch.setattr(Domain, "rows_of", first_hangs)
    try:
        disk.full = False
        eventually(lambda: [one.action for one in rig.engine.vms(ANYWHERE)] == ["", ""])
        eventually(lambda: sorted(asked) == sorted(uuid for uuid, _ in made))
    finally:
        answers.set()
    statuses = [BACKUP_DONE] * len(made)
    eventually(lambda: [rig.engine.backup(ANYWHERE, uuid).status for uuid, _ in made] == statuses)


def test_a_retry_for_which_there_was_no_thread_is_made_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(amends, "AGAIN_S", 0.02)
    start, refused, tried = threading.Thread.start, list[str](), list[int]()

    def start_later(thread: threading.Thread) -> None:
        if thread.name == "amends-try" and not refused:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    def act() -> None:
        tried.append(1)
        if len(tried) == 1:
            raise PointFull("no room for the state")

    monkeypatch.setattr(threading.Thread, "start", start_later)
    made = amends.Amends()
    made.start()
    try:
        with pytest.raises(PointFull):
            made.make(act)
        eventually(lambda: len(tried) == 2)
        assert refused
    finally:
        made.stop(PATIENCE_S)
