"""What is made of a domain's XML: no libvirt is needed."""

from __future__ import annotations

import pytest

from engine.libvirt.domains import parsed, read_domain
from engine.libvirt.machine import inflated, with_plugged_disks
from engine.libvirt.revive import NewDomain, new_domain_xml

XML = """<domain type='kvm'><name>mail</name><uuid>11111111-2222-3333-4444-555555555555</uuid>
<genid>99999999-2222-3333-4444-555555555555</genid>
<sysinfo type='smbios'><system><entry name='uuid'>11111111-2222-3333-4444-555555555555</entry>
</system></sysinfo>
<os><nvram template='/t'>/old/VARS.fd</nvram></os><devices>
<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='rbd'
 name='p/v'><host name='h'/></source><auth username='u'/><target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><source file='/pool/b.qcow2'/><backingStore type='file'/>
<target dev='vdb'/><shareable/></disk>
<disk type='file' device='cdrom'><source file='/iso'/><target dev='sda'/></disk>
<interface type='network'><mac address='52:54:00:00:00:01'/><target dev='vnet0'/></interface>
<serial type='file'><source path='/log/mail.log'/></serial>
<channel type='unix'><source mode='bind' path='/run/mail.agent'/>
<target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
<graphics type='vnc' port='5901' autoport='no'/></devices></domain>"""
NEW = NewDomain("aaaaaaaa-2222-3333-4444-555555555555", "mail2", {"vda": ("/new/v", "raw")}, {})


def test_facts() -> None:
    facts = read_domain(XML)
    assert [(d.target, d.kind, d.source, d.share) for d in facts.disks] == [
        ("vda", "network", "p/v", False),
        ("vdb", "file", "/pool/b.qcow2", True),
    ]
    assert facts.agent == "connected"


@pytest.mark.parametrize(
    ("kind", "source", "place"),
    [
        ("network", "protocol='nbd'><host name='h' port='1'/></source", "network:nbd h 1"),
        ("vhostuser", "type='unix' path='/run/v'/", "vhostuser:unix /run/v"),
        ("volume", "pool='p' volume='v'/", "p/v"),
        ("block", "dev='/dev/v'/", "/dev/v"),
        ("file", "startupPolicy='optional'/", ""),  # an empty drive
    ],
)
def test_only_a_disk_without_a_medium_is_left_out(kind: str, source: str, place: str) -> None:
    xml = (
        f"<domain><devices><disk type='{kind}' device='disk'><source {source}>"
        "<target dev='vda'/></disk></devices></domain>"
    )
    assert [disk.source for disk in read_domain(xml).disks] == ([place] if place else [])


@pytest.mark.parametrize(
    ("nvram", "place"),
    [
        ("<nvram template='/t'>/old/VARS.fd</nvram>", "/old/VARS.fd"),
        ("<nvram type='file'><source file='/old/VARS.fd'/></nvram>", "/old/VARS.fd"),
        ("<nvram type='block'><source dev='/dev/x'/></nvram>", "block"),
        ("<nvram/>", ""),
    ],
)
def test_where_the_firmware_has_its_variables(nvram: str, place: str) -> None:
    xml = XML.replace("<nvram template='/t'>/old/VARS.fd</nvram>", nvram)
    assert read_domain(xml).nvram == place
    new = NewDomain(NEW.uuid, "mail2", NEW.volumes, {}, nvram="/new/VARS.fd")
    made = parsed(new_domain_xml(xml, new)).find("os/nvram")
    assert made is not None
    assert (made.text, made.get("type"), list(made)) == ("/new/VARS.fd", None, [])


def test_a_tpm_that_is_a_file() -> None:
    for backend, version in (
        ("<backend type='emulator'/>", "2.0"),
        ("<backend type='emulator' version='1.2'/>", "1.2"),
        ("<backend type='passthrough'/>", ""),
    ):
        xml = XML.replace("</devices>", f"<tpm>{backend}</tpm></devices>")
        assert read_domain(xml).tpm == version
    assert read_domain(XML).tpm == ""


def test_a_new_domain_shares_nothing_with_the_old_one() -> None:
    made = new_domain_xml(XML, NEW)
    root = parsed(made)
    for old in ("1111111", "99999", "52:54", "vnet0", "5901", "/run/mail.agent", "/old/", "/iso"):
        assert old not in made
    assert root.findtext("uuid") == root.findtext("sysinfo/system/entry") == NEW.uuid
    assert root.findtext("name") == "mail2"
    disk, drive = root.findall("devices/disk")
    assert disk.get("type") == "file"
    assert disk.find("source").attrib == {"file": "/new/v"}  # type: ignore[union-attr]
    assert drive.find("source") is None
    assert "/log/mail2.log" in made


def test_a_disk_that_was_plugged_in_is_kept_and_every_volume_has_a_disk() -> None:
    live = XML.replace(
        "<serial type",
        "<disk device='disk'><source file='/x'/><target dev='vdc' bus='scsi'/>"
        "<address type='pci' slot='0x09'/></disk><serial type",
    )
    kept = with_plugged_disks(XML, live)
    assert kept.count("<disk ") == XML.count("<disk ") + 1
    assert "0x09" not in kept
    volumes = {name: (f"/new/{name}", "raw") for name in ("vda", "vdb", "vdc", "vdd")}
    root = parsed(new_domain_xml(kept, NewDomain(NEW.uuid, "mail2", volumes, {})))
    made = {
        node.find("target").get("dev"): node.find("source").get("file")  # type: ignore[union-attr]
        for node in root.iterfind("devices/disk[@device='disk']")
    }
    assert made == {name: path for name, (path, _) in volumes.items()}


def test_a_raw_volume_has_nothing_that_only_a_lun_or_a_qcow2_image_can_have() -> None:
    """libvirt would refuse the domain."""
    old = (
        "<disk type='block' device='lun' rawio='yes' sgio='filtered'>"
        "<driver name='qemu' type='qcow2' discard_no_unref='on'>"
        "<metadata_cache><max_size>1</max_size></metadata_cache></driver>"
        "<source dev='/x'/><target dev='sda' bus='scsi'/></disk>"
    )
    xml = XML.replace("<devices>", f"<devices>{old}")
    new = NewDomain(NEW.uuid, "mail2", {"sda": ("/new/v", "raw")}, {})
    disk, *drives = parsed(new_domain_xml(xml, new)).findall("devices/disk")
    assert disk.attrib == {"type": "file", "device": "disk"}
    driver = disk.find("driver")
    assert driver is not None
    assert (driver.attrib, list(driver)) == ({"name": "qemu", "type": "raw"}, [])
    assert [drive.get("device") for drive in drives] == ["cdrom"]


@pytest.mark.parametrize("xml", ["", "<a>", "<a/>", "<domain/>", "\x00"])
def test_what_is_no_domain_is_refused(xml: str) -> None:
    with pytest.raises(ValueError, match="not"):
        new_domain_xml(xml, NEW)


def test_labels_may_hold_anything() -> None:
    assert inflated(b"") == inflated(b"no zlib") == ""
