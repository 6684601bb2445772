"""Disks and sockets that we can't use as they are: each refused by name, and nothing else happens.

What we can't read QEMU can: the same disks of a running domain are backed up like any other.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from string import ascii_lowercase
from uuid import uuid4

import pytest

from engine.libvirt.binding import Domain
from engine.libvirt.domains import read_domain
from engine.libvirt.foreign import harmless
from engine.libvirt.machine import deflated, inflated
from engine.libvirt.revive import NewDomain, new_domain_xml
from engine.model import Job, Machine, Vm
from tests.engine_rig import PATIENCE_S, EngineRig
from tests.libvirt.host import MIB, Host, Image, disk_xml
from tests.libvirt.lab import NAME, Lab, make_lab
from tests.libvirt.site import contents, rig_on, wait_for_vm, wait_until
from tests.nfs.kit import find_tool

_LIVE = 1


@pytest.fixture(scope="module")
def rig(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRig]:
    with rig_on(tmp_path_factory.mktemp("site") / "data", host) as made:
        yield made


@pytest.fixture(scope="module")
def lab(host: Host, rig: EngineRig) -> Iterator[Lab]:
    made = make_lab(host, rig)
    yield made
    made.guest.close()


def network_disk(socket: Path, export: str = "") -> str:
    """A raw disk that a server of NBD has, by the name `export`."""
    name = f"name='{export}'" if export else ""
    return (
        "<disk type='network' device='disk'><driver name='qemu' type='raw'/>"
        f"<source protocol='nbd' {name}><host transport='unix' socket='{socket}'/></source>"
        "<target dev='vdc' bus='virtio'/></disk>"
    )


@contextlib.contextmanager
def served(host: Host, image: Image) -> Iterator[Path]:
    """The socket of a server of that raw image."""
    socket = host.root / "run" / "export.sock"
    command = [find_tool("qemu-nbd"), "-f", "raw", "-t", "-e", "4", "-k", str(socket)]
    server = subprocess.Popen([*command, str(image.path)], user="nobody")
    try:
        wait_until(socket.exists)
        yield socket
    finally:
        server.terminate()
        server.wait(PATIENCE_S)
        socket.unlink(missing_ok=True)


class TestStopped:
    def test_an_unknown_format(self, host: Host, rig: EngineRig) -> None:
        good = host.image("vda", "good.raw", MIB, "raw")
        odd = host.image("vdb", "odd.vdi", MIB, "vdi")
        before = sha256(odd.path.read_bytes()).digest()
        domain = host.define("odd", [good, odd])
        refused = refused_job(rig, "odd")
        assert f"{odd.path}: 'vdi' is a format that we can't read" in refused.error
        assert sha256(odd.path.read_bytes()).digest() == before
        domain.undefineFlags(0)

    def test_a_protocol_that_is_no_file(self, host: Host, rig: EngineRig) -> None:
        domain = define_with(host, "distant", network_disk(host.root / "nobody.sock", "x"))
        refused = refused_job(rig, "distant")
        assert "disk vdc (x) is no file in a pool" in refused.error
        domain.undefineFlags(0)

    def test_a_disk_that_has_no_name_is_not_left_out(self, host: Host, rig: EngineRig) -> None:
        """A backup that lacks a disk would be the worst of all."""
        domain = define_with(host, "nameless", network_disk(host.root / "nobody.sock"))
        named = f"disk vdc (network:nbd unix {host.root}/nobody.sock) is no file in a pool"
        assert named in refused_job(rig, "nameless").error
        domain.undefineFlags(0)

    def test_a_chain_is_backed_up_as_the_flattened_disk(self, host: Host, rig: EngineRig) -> None:
        base = host.image("vda", "base.qcow2", 4 * MIB)
        written(base, "write -P 1 0 2M")
        below = ("-b", str(base.path), "-F", "qcow2")
        top = host.image("vda", "top.qcow2", 4 * MIB, "qcow2", *below)
        written(top, "write -P 2 1M 2M")
        domain = host.define("tower", [top])
        vm = wait_for_vm(rig, "tower", lambda vm: vm is not None)
        backup = rig.back_up(vm)
        (flat,) = contents(rig, backup, "flat")
        assert flat == b"\1" * MIB + b"\2" * 2 * MIB + bytes(MIB)
        domain.undefineFlags(0)


class TestRunning:
    def test_what_we_can_not_read_qemu_does(self, lab: Lab) -> None:
        odd = lab.host.image("vdc", "live.vdi", 4 * MIB, "vdi")
        with plugged(lab, disk_xml(odd)):
            is_backed_up(lab)

    def test_a_disk_in_the_network(self, lab: Lab) -> None:
        image = lab.host.image("vdc", "served.raw", 4 * MIB, "raw")
        with served(lab.host, image) as socket, plugged(lab, network_disk(socket)):
            is_backed_up(lab)

    def test_a_medium_that_has_another_size_than_qemu_was_told(self, lab: Lab) -> None:
        """A volume is extended, and the guest is to see that later."""
        grown = lab.host.image("vdc", "grown.raw", 4 * MIB, "raw")
        with plugged(lab, disk_xml(grown)):
            lab.write("/dev/vdc", 1024)
            lab.back_up()
            os.truncate(grown.path, 6 * MIB)
            is_backed_up(lab)
            again = lab.back_up()
        assert "changes found by: vda bitmap, vdb scan, vdc scan" in again.label.notes

    def test_its_server_dies(self, lab: Lab) -> None:
        """The backup fails, the guest and its other disks go on."""
        image = lab.host.image("vdc", "dying.raw", 4 * MIB, "raw")
        with contextlib.ExitStack() as until_gone:
            undo = until_gone.enter_context(contextlib.ExitStack())
            socket = undo.enter_context(served(lab.host, image))
            until_gone.enter_context(plugged(lab, network_disk(socket)))
            lab.write("/dev/vdc", 1024)
            undo.close()
            assert lab.failed().error
        is_backed_up(lab, "vda", "vdb")


def test_so_many_disks_that_not_each_can_have_all_connections(host: Host, rig: EngineRig) -> None:
    """QEMU lets 100 in. What is more would wait for the others' end."""
    names = [f"sd{last}" for last in ascii_lowercase[:25]]  # sdz is there already
    names += [f"sda{last}" for last in ascii_lowercase[:9]]
    images = [host.image(name, f"many-{name}.raw", MIB, "raw") for name in names]
    for number, image in enumerate(images):
        image.path.write_bytes(bytes([number]) * MIB)
    disks = "".join(disk_xml(image).replace("'virtio'", "'scsi'") for image in images)
    scsi = "<controller type='scsi' index='0' model='virtio-scsi'/>"
    domain = define_with(host, "many", scsi + disks)
    domain.create()
    vm = wait_for_vm(rig, "many", lambda vm: vm is not None and len(vm.disks) == 34)
    backup = rig.back_up(vm)
    assert contents(rig, backup, "few") == [image.path.read_bytes() for image in images]
    domain.destroy()
    domain.undefineFlags(0)


@pytest.mark.parametrize(
    "disk",
    [
        "<disk type='block' device='lun' rawio='yes' sgio='filtered'>"
        "<driver name='qemu' type='raw'/><source dev='/dev/null'/>",
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'>"
        "<metadata_cache><max_size unit='MiB'>4</max_size></metadata_cache></driver>"
        "<source file='/nowhere/v'/>",
    ],
)
def test_one_that_is_restored_to_a_raw_file_is_one_that_libvirt_takes(
    host: Host, disk: str
) -> None:
    old = define_with(host, "peculiar", f"{disk}<target dev='sda' bus='scsi'/></disk>")
    volumes = {"sda": (f"{host.root}/pool/v", "raw")}
    new = NewDomain(str(uuid4()), "plain", volumes, marks={})
    made = host.connection.defineXML(new_domain_xml(old.XMLDesc(), new))
    (found,) = read_domain(made.XMLDesc()).disks
    assert (found.kind, found.source, found.format) == ("file", f"{host.root}/pool/v", "raw")
    for domain in (old, made):
        domain.undefineFlags(0)


def test_a_domain_that_another_cluster_kept_is_one_that_libvirt_takes(host: Host) -> None:
    """And its emulator is not the one that is named there."""
    image = host.image("vda", "foreign.raw", MIB, "raw")
    old = host.define("stranger", [image])
    theirs = re.sub("<emulator>.*?<", "<emulator>/nowhere/evil<", old.XMLDesc())
    machine, notes = harmless(Machine(deflated(theirs.encode())))
    assert machine is not None
    assert [note.rpartition(": ")[2] for note in notes] == ["cmdline, initrd, kernel"]
    new = NewDomain(str(uuid4()), "known", {"vda": (f"{host.root}/pool/v", "raw")}, marks={})
    made = host.connection.defineXML(new_domain_xml(inflated(machine.xml), new))
    assert re.findall("<emulator>.*?<", made.XMLDesc()) == re.findall(
        "<emulator>.*?<", old.XMLDesc()
    )
    for domain in (old, made):
        domain.undefineFlags(0)


_WATCHES = """
import sys
from pathlib import Path
from api.metrics import Metrics
from tests.engine_rig import EngineRig
from tests.libvirt.site import config_for, wait_for_vm, wait_until
with EngineRig(Path(sys.argv[1]), config_for(sys.argv[2])) as rig:
    (host,) = rig.engine.hypervisors()
    metric = f'vmkeep_hypervisor_online{{host="{host.name}"}} %.1f'
    assert metric % 0 in Metrics(rig.engine).render().decode()
    print(host.problem, flush=True)
    sys.stdin.readline()
    wait_until(lambda: not rig.engine.hypervisors()[0].problem)
    wait_for_vm(rig, "guarded", lambda vm: vm is not None)
    assert metric % 1 in Metrics(rig.engine).render().decode()
"""
_AS_ANYBODY = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def test_no_leave_to_use_the_socket(host: Host, tmp_path: Path) -> None:
    """It is named while it lasts; given leave, everything goes on by itself."""
    domain = host.define("guarded", [])
    run = host.root / "run"
    run.chmod(0o700)
    command = [*_AS_ANYBODY, sys.executable, "-c", _WATCHES, str(tmp_path / "data"), host.uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as us:
        try:
            assert us.stdout is not None
            assert "Permission denied" in us.stdout.readline()
            for place in (run, run / "libvirt", run / "libvirt" / "libvirt-sock"):
                place.chmod(0o777)
            us.communicate("\n", PATIENCE_S)
        except BaseException:
            us.kill()
            raise
    assert us.returncode == 0
    domain.undefineFlags(0)


def define_with(host: Host, name: str, disk: str) -> Domain:
    """A domain with that disk only."""
    xml = host.define(name, []).XMLDesc()
    return host.connection.defineXML(xml.replace("<devices>", f"<devices>{disk}"))


def refused_job(rig: EngineRig, name: str) -> Job:
    """The job of a backup that fails, and leaves the VM free."""

    def has_disks(vm: Vm | None) -> bool:
        return vm is not None and bool(vm.disks)

    vm = wait_for_vm(rig, name, has_disks)
    job = rig.ended(rig.ask_backup(vm)[1])
    assert job.state == "failed", job
    assert rig.engine.vm(vm.uuid).action == ""
    return job


def written(image: Image, command: str) -> None:
    words = [find_tool("qemu-io"), "-f", image.format, "-c", command, str(image.path)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def plugged(lab: Lab, disk: str) -> Iterator[None]:
    """vdc, in the running guest."""
    lab.domain.attachDeviceFlags(disk, _LIVE)  # type: ignore[attr-defined]
    wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and len(vm.disks) == 3)
    try:
        yield
    finally:
        lab.domain.detachDeviceFlags(disk, _LIVE)  # type: ignore[attr-defined]
        wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and len(vm.disks) == 2)


def is_backed_up(lab: Lab, *devices: str) -> None:
    """A backup now is what the guest reads."""
    if not devices:
        lab.write("/dev/vdc", 1024)
    truth = lab.quiet(*(devices or ("vda", "vdb", "vdc")))
    backup = lab.back_up()
    assert lab.restored_sums(backup) == truth
