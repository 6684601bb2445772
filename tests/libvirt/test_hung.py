"""A libvirtd that hangs (SIGSTOP): it is named, nobody else waits, and all goes on when it does."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from msgspec.structs import replace

from api.metrics import Metrics
from engine.config import Freeze, Limits
from engine.errors import HypervisorAway
from engine.libvirt import inventory, watch
from engine.libvirt.ending import LATER_PAUSE_S
from engine.libvirt.scratch import ScratchWatch
from engine.model import Job
from engine.snapshot import freeze
from tests.engine_rig import ANYWHERE, PATIENCE_S, EngineRig
from tests.libvirt.host import Host
from tests.libvirt.lab import NAME, Lab, make_lab, paused_reading
from tests.libvirt.site import config_for, wait_for_vm, wait_until

libvirt = pytest.importorskip("libvirt")

AT_ONCE = Limits(stalled_after_s=0.001)


@pytest.fixture(scope="module")
def lab(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    config = config_for(host.uri, scratch=host.scratch)
    config = replace(config, limits=AT_ONCE, freeze=Freeze(timeout_s=1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "ASK_EVERY_S", 0.1)
        patch.setattr(watch, "SILENT_AFTER_S", 1.0)
        with EngineRig(tmp_path_factory.mktemp("site") / "data", config) as rig:
            made = make_lab(host, rig)
            yield made
            made.guest.close()


def stalled(lab: Lab, job: str) -> Job:
    """The job, once it is said to stand still; it is libvirt that it waits for."""
    deadline_s = time.monotonic() + PATIENCE_S
    while (seen := lab.rig.engine.job(job)).stalled_s < 1:
        assert time.monotonic() < deadline_s, seen
        time.sleep(0.01)
    assert (seen.state, seen.stalled_on) == ("running", f"libvirt {lab.host.uri}")
    return seen


def test_a_backup_waits_at_its_end(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "ANSWER_TIMEOUT_S", 0.5)
    truth = lab.quiet()
    vm = lab.vm
    with lab.host.hung() as hang:
        with paused_reading(monkeypatch) as reached:
            backup, job = lab.rig.ask_backup(vm)
            assert reached.wait(PATIENCE_S)
            hang()
        began_s = time.monotonic()
        with pytest.raises(HypervisorAway, match=r"no answer (in 0\.5|for \d+) s"):
            lab.rig.core.inventory.begin_action(vm.uuid, "backing_up")
        stalled(lab, job)
        require_known(lab)
        with pytest.raises(HypervisorAway, match=re.escape(lab.host.uri)):
            lab.rig.core.inventory.begin_action(vm.uuid, "backing_up")
        assert time.monotonic() - began_s < PATIENCE_S / 20
    lab.rig.succeed(job)
    assert lab.restored_sums(lab.rig.engine.backup(ANYWHERE, backup)) == truth
    lab.back_up()


def require_known(lab: Lab) -> None:
    """Who asks what there is gets it at once, with what is wrong."""
    seen = wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and vm.state == "unreachable")
    assert lab.host.uri in seen.last_error
    began_s = time.monotonic()
    assert NAME in [vm.name for vm in lab.rig.engine.vms(ANYWHERE)]
    assert lab.rig.engine.pools()
    shown = Metrics(lab.rig.engine).render().decode()
    assert f'vmkeep_jobs_stalled_seconds{{on="libvirt {lab.host.uri}"}}' in shown
    assert f'vmkeep_hypervisor_online{{host="{lab.host.uri}"}} 0.0' in shown
    assert time.monotonic() - began_s < 2


def hang_once(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, hang: Callable[[], None]
) -> None:
    """Before the first call of that method."""
    left, method = [hang], getattr(owner, name)

    def hang_then_call(self: object, *args: object) -> object:
        while left:
            left.pop()()
        return method(self, *args)

    monkeypatch.setattr(owner, name, hang_then_call)


@pytest.mark.parametrize("dies", [False, True])
def test_a_backup_waits_at_its_begin(lab: Lab, monkeypatch: pytest.MonkeyPatch, dies: bool) -> None:
    """If the libvirtd that hung is killed, it can't be begun, says why, and leaves nothing."""
    lab.quiet()
    with lab.host.hung() as hang:
        hang_once(monkeypatch, ScratchWatch, "require_room", hang)
        _, job = lab.rig.ask_backup(lab.vm)
        stalled(lab, job)
        require_known(lab)
        if dies:
            restart(lab)
    ended = lab.rig.ended(job)
    assert ended.state == ("failed" if dies else "succeeded")
    assert (lab.host.uri in ended.error) is dies
    require_sound(lab)


def restart(lab: Lab) -> None:
    """libvirtd is killed, and another one runs; the guest runs on."""
    lab.host.kill()
    lab.host.start()
    lab.domain = lab.host.connection.lookupByUUIDString(lab.domain.UUIDString())
    wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and vm.state == "running")


def require_sound(lab: Lab) -> None:
    """The guest writes, and its next backup is what it wrote."""
    wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and vm.state == "running")
    lab.write("/mnt/after", 64)
    truth = lab.quiet()
    assert lab.restored_sums(lab.back_up()) == truth


def test_a_guest_that_was_frozen_thaws_when_libvirt_is_back(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only libvirt can reach the agent; all attempts fail before that, the watchdog's too."""
    monkeypatch.setattr(freeze, "_THAW_FOR_S", 0.0)
    lab.write("/mnt/before", 64)
    with lab.host.hung() as hang:
        hang_once(monkeypatch, libvirt.virDomain, "backupBegin", hang)
        _, job = lab.rig.ask_backup(lab.vm)
        stalled(lab, job)
        lab.host.kill()
        wait_until(lambda: "thaw_failed" in caplog.messages)
        lab.host.start()
        lab.domain = lab.host.connection.lookupByUUIDString(lab.domain.UUIDString())
    assert lab.rig.ended(job).state == "failed"
    require_sound(lab)


def test_a_guest_that_is_paused_while_frozen_thaws_when_it_goes_on(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the freeze writes what fills the pool up: QEMU pauses it, until there is room."""
    monkeypatch.setattr(freeze, "_THAW_FOR_S", 0.0)
    domain: Any = lab.domain
    hang_once(monkeypatch, libvirt.virDomain, "backupBegin", domain.suspend)
    backup = lab.back_up()
    assert "thaw failed: the VM may still be frozen" in backup.label.notes
    time.sleep(3 * LATER_PAUSE_S)
    domain.resume()
    wait_until(lambda: "thawed_late" in caplog.messages)
    require_sound(lab)


@pytest.mark.parametrize("dies", [False, True])
def test_a_restore_waits_at_its_end(lab: Lab, monkeypatch: pytest.MonkeyPatch, dies: bool) -> None:
    truth = lab.quiet()
    backup = lab.back_up()
    name = f"patient-{dies}"
    with lab.host.hung() as hang:
        hang_once(monkeypatch, libvirt.virConnect, "defineXML", hang)
        vm, job = lab.rig.ask_restore(backup, name)
        stalled(lab, job)
        require_known(lab)
        if dies:
            restart(lab)
    lab.rig.succeed(job)
    assert wait_for_vm(lab.rig, name, lambda vm: vm is not None and vm.host != "").uuid == vm
    wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and vm.state == "running")
    assert lab.restored_sums(backup) == truth


def test_many_calls_that_wait_at_once_all_go_on(lab: Lab) -> None:
    """libvirt's own keepalive would end the process here."""
    uuid = lab.domain.UUIDString()
    watched = next(iter(lab.rig.core.inventory._watches.values()))  # type: ignore[attr-defined]
    with ThreadPoolExecutor(4) as threads, lab.host.hung() as hang:
        hang()
        calls = [threads.submit(watched.has, uuid) for _ in range(4)]
        time.sleep(4)
        assert not any(call.done() for call in calls)
        lab.host.go_on()
        assert [call.result(PATIENCE_S) for call in calls] == [True] * 4
