"""A running VM that is backed up, and that others use too: they look at it, begin jobs, left some.

One VM for all tests, as in test_live.py.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.libvirt import ending
from engine.libvirt.binding import Domain, LibvirtFault, connect
from engine.libvirt.watch import look
from tests.engine_rig import PATIENCE_S
from tests.libvirt.lab import NAME, QCOW2_BYTES, RAW_BYTES, Lab, paused_reading
from tests.libvirt.site import wait_for_vm, wait_until

libvirt = pytest.importorskip("libvirt")


@contextlib.contextmanager
def looked_at(lab: Lab, how_often: int, look_at: Callable[[Any], object]) -> Iterator[None]:
    """So many look at the domain all the time."""
    enough, faults = threading.Event(), list[Exception]()

    def look_on() -> None:
        connection = connect(lab.host.uri)
        domain = connection.lookupByUUIDString(lab.domain.UUIDString())
        try:
            while not enough.is_set():
                look_at(domain)
        except LibvirtFault as fault:
            faults.append(fault)
        finally:
            connection.close()

    threads = [threading.Thread(target=look_on) for _ in range(how_often)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    assert faults == []


def test_who_looks_at_a_domain_while_its_backup_begins_does_not_end_it(lab: Lab) -> None:
    """QEMU may abort when it is asked for its block nodes while it creates an image; so it does
    not create any."""
    before = lab.host.log.stat().st_size
    with looked_at(lab, 3, lambda domain: [domain.blockInfo(name) for name in ("vda", "vdb")]):
        for _ in range(5):
            lab.back_up()
    assert lab.domain.isActive()
    told = lab.host.log.read_bytes()[before:]
    assert b'"execute":"transaction"' in told
    assert b'"execute":"blockdev-create"' not in told


def test_a_look_at_a_running_domain_asks_qemu_nothing_of_its_disks(lab: Lab) -> None:
    """Somebody's snapshot may be creating an image."""
    wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and vm.disks[0].capacity == QCOW2_BYTES)
    before = lab.host.log.stat().st_size
    seen = look(lab.host.connection)
    assert {domain.facts.name: domain.capacities for domain in seen.domains}[NAME] == {
        "vda": QCOW2_BYTES,
        "vdb": RAW_BYTES,
    }
    assert b"query-named-block-nodes" not in lab.host.log.read_bytes()[before:]
    lab.domain.blockInfo("vda")
    assert b"query-named-block-nodes" in lab.host.log.read_bytes()[before:]


def begin_job(domain: Domain, place: str) -> None:
    """A backup job whose files' paths begin with `place`."""
    domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{place}sock'/><disks>"
        f"<disk name='vdb' backup='yes' type='file'><driver type='qcow2'/>"
        f"<scratch file='{place}scratch'/></disk></disks></domainbackup>",
        None,
    )


@contextlib.contextmanager
def left_alone(lab: Lab) -> Iterator[None]:
    """A job is on at the end, and is no more then."""
    try:
        yield
        assert lab.domain.jobInfo()[0] != 0
    finally:
        lab.domain.abortJob()
        wait_until(lambda: lab.domain.jobInfo()[0] == 0)


@pytest.mark.parametrize("directory", ["run", "scratch"])
def test_a_second_job_on_the_domain_is_a_conflict_at_once(lab: Lab, directory: str) -> None:
    """Also that of another service, with the same scratch directory."""
    begin_job(lab.domain, f"{lab.host.root}/{directory}/another-")
    with left_alone(lab):
        _, job = lab.rig.ask_backup(lab.vm)
        assert "another job" in lab.rig.ended(job).error


def test_who_looks_for_left_jobs_while_anothers_begins_does_not_end_the_domain(lab: Lab) -> None:
    """libvirt says the same of it as of one that it died in the middle of. It is the other's own
    images that QEMU is creating."""

    def begin_some(first: int, how_many: int) -> int:
        """How often QEMU was asked for its nodes."""
        before = lab.host.log.stat().st_size
        for number in range(first, first + how_many):
            with left_alone(lab):
                begin_job(lab.domain, f"{lab.host.root}/run/busy{number}-")
        return lab.host.log.read_bytes()[before:].count(b'"execute":"query-named-block-nodes"')

    by_libvirt = begin_some(0, 5)
    with looked_at(lab, 3, lambda domain: ending.end_left_job(lambda: domain, lab.ours)):
        assert begin_some(5, 5) == by_libvirt > 0
    assert lab.domain.isActive()


def test_another_job_that_waits_for_ours_to_end_begins_undisturbed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt lets it wait, and begins it when ours has ended: before our checkpoints are in order,
    which has to wait then."""
    other = connect(lab.host.uri)
    try:
        domain = other.lookupByUUIDString(lab.domain.UUIDString())
        with paused_reading(monkeypatch) as reached:
            _, job = lab.rig.ask_backup(lab.vm)
            assert reached.wait(PATIENCE_S)
            begin = functools.partial(begin_job, domain, f"{lab.host.root}/run/waiting-")
            waiting = threading.Thread(target=begin)
            waiting.start()
            time.sleep(1)
        with left_alone(lab):
            waiting.join()
            assert lab.rig.ended(job).state == "succeeded"
    finally:
        other.close()
    backup = lab.back_up()
    assert [name[-36:] for name in lab.checkpoints()] == [backup.uuid]


def test_a_job_that_somebody_begins_meanwhile_is_left_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not waited for with the guest frozen."""
    freeze = libvirt.virDomain.fsFreeze

    def begin_and_freeze(domain: Any) -> Any:
        begin_job(lab.domain, f"{lab.host.root}/run/other-")
        monkeypatch.delattr(libvirt.virDomain, "backupBegin")
        return freeze(domain)

    monkeypatch.setattr(libvirt.virDomain, "fsFreeze", begin_and_freeze)
    with left_alone(lab):
        assert "another job" in lab.failed().error


def test_a_job_that_a_killed_service_left_is_ended(lab: Lab) -> None:
    begin_job(lab.domain, f"{lab.ours}left.")
    lab.back_up()


def test_it_is_ended_by_the_next_process_too(lab: Lab) -> None:
    """When libvirt is back; and what is left of a job that is over goes."""
    begin_job(lab.domain, f"{lab.ours}left.")
    Path(f"{lab.ours}longer-ago").touch()
    lab.host.stop()
    lab.rig.restart()
    lab.host.start()
    domain = lab.domain = lab.host.connection.lookupByUUIDString(lab.domain.UUIDString())
    wait_until(lambda: domain.jobInfo()[0] == 0)
    wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and vm.state == "running")
    lab.back_up()
