"""What another cluster kept of a machine has nothing of this host but networks. No libvirt here."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

import pytest

from engine.libvirt.domains import parsed, read_domain
from engine.libvirt.foreign import harmless
from engine.libvirt.machine import deflated, inflated
from engine.libvirt.revive import NewDomain, new_domain_xml
from engine.model import Machine
from tests.qemu.images import create

QEMU = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"
PLAIN = f"""<domain type='kvm' {QEMU}><name>mail</name><memory unit='MiB'>512</memory>
<vcpu>2</vcpu><cpu mode='custom'><model>qemu64</model></cpu><features><acpi/></features>
<os firmware='efi'><type machine='q35'>hvm</type>
<loader type='pflash'>/usr/share/OVMF/CODE.fd</loader></os>
<devices><emulator>/usr/bin/qemu</emulator>
<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/>
<source file='/pool/v'/><target dev='vda' bus='virtio'/><boot order='1'/></disk>
<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>
<controller type='usb' model='qemu-xhci'/>
<interface type='bridge'><source bridge='br0'/><model type='virtio'/></interface>
<channel type='unix'><source path='/run/a'/><target type='virtio' name='org.qemu.guest_agent.0'/>
</channel>
<serial type='pty'><target type='isa-serial' port='0'/></serial>
<tpm model='tpm-crb'><backend type='emulator' version='1.2'/></tpm>
<video><model type='vga'/></video><graphics type='vnc' keymap='de'/><rng model='virtio'>
<backend model='random'>/dev/random</backend></rng></devices></domain>"""
EVIL = "/evil/thing"
IN_X = "xmlns:x='urn:x'"
IN_DEVICES = {
    f"<emulator>{EVIL}</emulator>": "",
    f"<filesystem><source dir='{EVIL}'/><target dir='x'/></filesystem>": "filesystem",
    f"<hostdev mode='subsystem' type='pci'><source><address x='{EVIL}'/></source></hostdev>": (
        "hostdev"
    ),
    f"<interface type='ethernet'><script path='{EVIL}'/></interface>": "interface",
    f"<interface type='bridge'><script path='{EVIL}'/><source bridge='b'/></interface>": "",
    f"<interface type='network'><backend tap='{EVIL}'/><rom file='{EVIL}'/></interface>": "",
    f"<interface type='network'><source network='n' dev='{EVIL}'/></interface>": "",
    f"<interface type='bridge'><virtualport type='{EVIL}'/><vlan/></interface>": (
        "virtualport, vlan"
    ),
    f"<interface type='vhostuser'><source path='{EVIL}'/></interface>": "interface",
    f"<disk device='cdrom'><source file='{EVIL}'/><target dev='sdb'/></disk>": "",
    f"<disk device='disk'><source file='{EVIL}'/><target dev='vdz'/></disk>": "",
    f"<disk device='disk'><mirror file='{EVIL}'/><target dev='vda'/></disk>": "",
    f"<serial type='file'><source path='{EVIL}'/><target port='1'/></serial>": "",
    f"<serial type='pty'><log file='{EVIL}'/></serial>": "",
    f"<serial type='unix'><source mode='connect' path='{EVIL}'/></serial>": "",
    f"<console type='tcp'><source host='{EVIL}'/></console>": "",
    f"<parallel type='dev'><source path='{EVIL}'/></parallel>": "",
    f"<channel type='unix'><source path='{EVIL}'/><target type='guestfwd' port='1'/></channel>": (
        "channel"
    ),
    f"<channel type='unix'><source path='{EVIL}'/><target type='virtio' name='n'/></channel>": "",
    f"<channel type='dev'><source path='{EVIL}'/><target type='virtio'/></channel>": "channel",
    f"<channel type='unix'><target type='virtio' name='../..{EVIL}'/></channel>": "channel",
    "<interface type='user'><model type='evil'/></interface>": "interface",
    "<interface type='bridge'><source bridge='b'/><mtu size='evil'/></interface>": "",
    f"<graphics type='vnc' keymap='..{EVIL}'/>": "",
    f"<disk device='cdrom'><driver {IN_X} x:type='evil' type='raw'/><target dev='sdb'/></disk>": "",
    f"<interface type='bridge'><model><a {IN_X}><x:b>evil</x:b></a></model></interface>": "",
    "<disk device='cdrom'><driver type='raw'/><driver type='evil'/><target dev='c'/></disk>": "",
    f"<input type='evdev'><source dev='{EVIL}'/></input>": "input",
    f"<input type='passthrough'><source evdev='{EVIL}'/></input>": "input",
    f"<graphics type='vnc' passwd='{EVIL}'><listen type='socket' socket='{EVIL}'/></graphics>": "",
    f"<graphics type='egl-headless'><gl rendernode='{EVIL}'/></graphics>": "graphics",
    f"<video><driver name='x'/><model type='virtio'><a rendernode='{EVIL}'/></model></video>": "",
    f"<audio id='1' type='file' path='{EVIL}'/>": "",
    f"<rng model='virtio'><backend model='egd'><source path='{EVIL}'/></backend></rng>": "",
    f"<tpm><backend type='passthrough'><device path='{EVIL}'/></backend></tpm>": "tpm",
    f"<tpm><backend type='emulator'><source type='dir' path='{EVIL}'/></backend></tpm>": "",
    f"<memory model='nvdimm'><source><path>{EVIL}</path></source></memory>": "memory",
    f"<memory model='dimm'><source><path>{EVIL}</path></source><target/></memory>": "",
    f"<shmem name='{EVIL}'/>": "shmem",
    f"<smartcard mode='host-certificates'><database>{EVIL}</database></smartcard>": "smartcard",
    f"<pstore backend='acpi-erst'><path>{EVIL}</path></pstore>": "pstore",
    f"<lease><target path='{EVIL}'/></lease>": "lease",
    f"<redirdev type='tcp'><source host='{EVIL}'/></redirdev>": "redirdev",
    f"<of-tomorrow path='{EVIL}'/>": "of-tomorrow",
}
IN_DOMAIN = {
    f"<qemu:commandline><qemu:arg value='{EVIL}'/></qemu:commandline>": "commandline",
    f"<seclabel type='static'><label>{EVIL}</label></seclabel>": "",
    f"<metadata><a xmlns='urn:a'>{EVIL}</a></metadata>": "",
    f"<memoryBacking><source type='{EVIL}'/></memoryBacking>": "memoryBacking",
    f"<sysinfo type='fwcfg'><entry name='opt/x' file='{EVIL}'/></sysinfo>": "sysinfo",
    f"<sysinfo {IN_X} x:type='evil' type='smbios'/>": "",
    f"<devices><emulator>{EVIL}</emulator></devices>": "devices",
    f"<os><kernel>{EVIL}</kernel></os>": "os",
    f"<resource><partition>{EVIL}</partition></resource>": "",
}
IN_OS = {
    f"<kernel>{EVIL}</kernel>": "kernel",
    f"<initrd>{EVIL}</initrd>": "initrd",
    f"<dtb>{EVIL}</dtb>": "dtb",
    f"<acpi><table type='slic'>{EVIL}</table></acpi>": "acpi",
    f"<nvram template='{EVIL}'>{EVIL}</nvram>": "",
    f"<loader type='rom' readonly='no'>{EVIL}</loader>": "loader",
    f"<loader type='pflash'>/usr/share/../..{EVIL}</loader>": "loader",
}


def kept(xml: str) -> tuple[str, tuple[str, ...]]:
    """(the XML that an import keeps, its notes)."""
    machine, notes = harmless(Machine(deflated(xml.encode()), checkpoint=b"c", nvram=b"n"))
    assert machine is not None
    assert (machine.checkpoint, machine.nvram) == (b"", b"n")
    return inflated(machine.xml), notes


def restored(xml: str) -> ET.Element:
    new = NewDomain("aaaaaaaa-2222-3333-4444-555555555555", "new", {"vda": ("/p/v", "raw")}, {})
    return parsed(new_domain_xml(xml, new))


def test_the_machine_itself_stays() -> None:
    xml, notes = kept(PLAIN)
    assert notes == ()
    root = restored(xml)
    for path, attributes in {
        "cpu": {"mode": "custom"},
        "os/type": {"machine": "q35"},
        "os/loader": {"type": "pflash", "readonly": "yes"},
        "devices/disk/driver": {"name": "qemu", "type": "raw", "cache": "none"},
        "devices/disk/target": {"dev": "vda", "bus": "virtio"},
        "devices/disk/source": {"file": "/p/v"},
        "devices/controller": {"type": "usb", "model": "qemu-xhci"},
        "devices/interface/source": {"bridge": "br0"},
        "devices/interface/model": {"type": "virtio"},
        "devices/channel/target": {"type": "virtio", "name": "org.qemu.guest_agent.0"},
        "devices/serial/target": {"type": "isa-serial", "port": "0"},
        "devices/tpm/backend": {"type": "emulator", "version": "1.2"},
        "devices/video/model": {"type": "vga"},
        "devices/rng/backend": {"model": "random"},
    }.items():
        node = root.find(path)
        assert node is not None, path
        assert node.attrib == attributes
    assert root.findtext("memory") == "512"
    assert [disk.get("device") for disk in root.findall("devices/disk")] == ["disk", "cdrom"]
    assert root.find("devices/emulator") is None
    assert read_domain(ET.tostring(root, encoding="unicode")).tpm == "1.2"


@pytest.mark.parametrize(
    ("place", "element", "named"),
    [
        (place, element, named)
        for place, elements in (
            ("</devices>", IN_DEVICES),
            ("</domain>", IN_DOMAIN),
            ("</os>", IN_OS),
        )
        for element, named in elements.items()
    ],
)
def test_what_is_the_hosts_does_not(place: str, element: str, named: str) -> None:
    xml, notes = kept(PLAIN.replace(place, f"{element}{place}"))
    assert "evil" not in ET.tostring(restored(xml), encoding="unicode")
    assert "evil" not in "".join(notes)
    assert [note.rpartition(": ")[2] for note in notes] == ([named] if named else [])


def test_a_loader_that_is_left_out_is_chosen_by_libvirt() -> None:
    xml = PLAIN.replace(" firmware='efi'", "").replace("/usr/share/OVMF", "/opt")
    found = parsed(kept(xml)[0]).find("os")
    assert found is not None
    assert (found.get("firmware"), found.find("loader")) == ("efi", None)


def test_a_loader_is_where_libvirt_reads_that_it_is() -> None:
    xml = PLAIN.replace("/OVMF", "/OVMF<a>/../../..</a>/evil")
    os_node = restored(kept(xml)[0]).find("os")
    assert os_node is not None
    assert "evil" not in "".join(os_node.itertext())


@pytest.mark.parametrize("options", ["backing", "data_file", "plain", "raw"])
def test_the_firmwares_variables_are_in_no_other_file(tmp_path: Path, options: str) -> None:
    image, evil = tmp_path / "nvram", tmp_path / "evil"
    evil.write_bytes(bytes(1 << 20))
    how = {"backing": ["-b", str(evil), "-F", "raw"], "data_file": ["-o", f"data_file={evil}"]}
    if options == "raw":
        image.write_bytes(bytes(1 << 20))
    else:
        create(image, "1M", *how.get(options, ()))
    nvram = deflated(image.read_bytes())
    machine, notes = harmless(Machine(deflated(PLAIN.encode()), nvram=nvram))
    assert machine is not None
    assert (machine.nvram == nvram, notes == ()) == (options not in how,) * 2


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "<a>",
        "<a/>",
        "<domain/>",
        f"<domain><devices/><cpu>{'<a>' * 5000}{'</a>' * 5000}</cpu></domain>",
        "<!DOCTYPE a [<!ENTITY a 'a'>]><domain><devices/><title>&a;</title></domain>",
    ],
    ids=["", "unended", "another", "empty", "deep", "entities"],
)
def test_what_is_no_domain_is_left_out(xml: str) -> None:
    machine, notes = harmless(Machine(deflated(xml.encode())))
    assert (machine, notes) == (
        None,
        ("the domain's XML is left out: it is no domain's, or too large",),
    )


def test_one_that_no_label_would_hold_is_left_out() -> None:
    """At the import, not at the end of a restore."""
    title = random.Random(1).randbytes(300_000).hex()
    xml = PLAIN.replace("<name>", f"<title>{title}</title><name>")
    assert harmless(Machine(zlib.compress(xml.encode())))[0] is None
