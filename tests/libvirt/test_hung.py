"""A libvirtd that hangs (SIGSTOP): it is named, nobody else waits, and all goes on when it does."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from api.metrics import Metrics
from engine import freeze
from engine.config import Freeze, Limits
from engine.errors import HypervisorAway
from engine.libvirt import binding, inventory
from engine.libvirt.scratch import ScratchWatch
from engine.model import Job
from tests.engine_rig import ANYWHERE, PATIENCE_S, EngineRig
from tests.libvirt.host import Host
from tests.libvirt.lab import NAME, Lab, make_lab, paused_reading
from tests.libvirt.site import config_for, wait_for_vm, wait_until
from tests.nfs.kit import Kit

libvirt = pytest.importorskip("libvirt")

AT_ONCE = Limits(stalled_after_s=0.001)
FOUND_OUT_S = {"hung": (5, 4), "lost": (1, 2)}  # keepalive: "lost" is noticed within the test


@pytest.fixture(scope="module", params=list(FOUND_OUT_S))
def lab(
    kit: Kit,
    cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Lab]:
    interval_s, count = FOUND_OUT_S[request.param]
    with contextlib.ExitStack() as undo:
        patch = undo.enter_context(pytest.MonkeyPatch.context())
        host = undo.enter_context(contextlib.closing(Host(kit, cache)))
        patch.setattr(binding, "KEEPALIVE_S", interval_s)
        patch.setattr(binding, "KEEPALIVE_COUNT", count)
        freeze = Freeze(timeout_s=1.0)
        config = config_for(host.uri, scratch=host.scratch)
        config = replace(config, limits=AT_ONCE, freeze=freeze)
        data = tmp_path_factory.mktemp("site") / "data"
        made = make_lab(host, undo.enter_context(EngineRig(data, config)))
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
        stalled(lab, job)
        require_known(lab)
        began_s = time.monotonic()
        with pytest.raises(HypervisorAway, match=re.escape(lab.host.uri)):
            lab.rig.core.inventory.begin_action(vm.uuid, "backing_up")
        assert time.monotonic() - began_s < PATIENCE_S / 20
    lab.rig.succeed(job)
    assert lab.restored_sums(lab.rig.engine.backup(ANYWHERE, backup)) == truth
    lab.back_up()


def require_known(lab: Lab) -> None:
    """Who asks what there is gets it at once, with what is wrong."""
    if lost():
        seen = wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and vm.state == "unreachable")
        assert lab.host.uri in seen.last_error
    began_s = time.monotonic()
    assert NAME in [vm.name for vm in lab.rig.engine.vms(ANYWHERE)]
    assert lab.rig.engine.pools()
    shown = Metrics(lab.rig.engine).render().decode()
    assert f'vmkeep_jobs_stalled_seconds{{on="libvirt {lab.host.uri}"}}' in shown
    assert (f'vmkeep_hypervisor_online{{host="{lab.host.uri}"}} 0.0' in shown) is lost()
    assert time.monotonic() - began_s < 2


def lost() -> bool:
    """Whether keepalive gives up the connection within a test."""
    return binding.KEEPALIVE_S == 1


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


def test_a_backup_waits_at_its_begin(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that can't be begun says why, and leaves nothing."""
    lab.quiet()
    with lab.host.hung() as hang:
        hang_once(monkeypatch, ScratchWatch, "require_room", hang)
        _, job = lab.rig.ask_backup(lab.vm)
        stalled(lab, job)
        require_known(lab)
    ended = lab.rig.ended(job)
    assert ended.state == ("failed" if lost() else "succeeded")
    assert (lab.host.uri in ended.error) is lost()
    lab.write("/mnt/after", 64)
    truth = lab.quiet()
    assert lab.restored_sums(lab.back_up()) == truth


def test_a_guest_that_was_frozen_thaws_when_libvirt_is_back(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only libvirt can reach the agent; all attempts fail before that."""
    if not lost():
        pytest.skip("the connection has to be lost")
    monkeypatch.setattr(freeze, "_THAW_ATTEMPTS", 1)
    lab.write("/mnt/before", 64)
    with lab.host.hung() as hang:
        hang_once(monkeypatch, libvirt.virDomain, "backupBegin", hang)
        _, job = lab.rig.ask_backup(lab.vm)
        stalled(lab, job)
        require_known(lab)
        wait_until(lambda: "thaw_failed" in caplog.messages)
    assert lab.rig.ended(job).state == "failed"
    lab.write("/mnt/after", 64)
    truth = lab.quiet()
    assert lab.restored_sums(lab.back_up()) == truth


def test_a_restore_waits_at_its_end(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = lab.quiet()
    backup = lab.back_up()
    with lab.host.hung() as hang:
        hang_once(monkeypatch, libvirt.virConnect, "defineXML", hang)
        vm, job = lab.rig.ask_restore(backup, "patient")
        stalled(lab, job)
        require_known(lab)
    lab.rig.succeed(job)
    assert wait_for_vm(lab.rig, "patient", lambda vm: vm is not None and vm.host != "").uuid == vm
    assert lab.restored_sums(backup) == truth
