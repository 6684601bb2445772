"""From a backed-up domain's XML to that of the new VM that a restore makes.

New are the uuid, the name, the MACs, the volumes, and whatever two domains of one host can't share:
paths of sockets and logs, fixed ports, the generation id. All else is as it was, but for what a
disk can't have in its new format, or in a file. Disks that are not restored are left out, and
nothing is in the drives.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass

from engine.libvirt.domains import MARKS_URI, parsed, target_of

_DISK_DEVICES = ("disk", "lun")
_CHARACTER_DEVICES = ("serial", "console", "parallel", "channel")


@dataclass(frozen=True, slots=True)
class NewDomain:
    """`volumes`: (path, format) by target. `marks`: where it belongs. `nvram`: a file, or ""."""

    uuid: str
    name: str
    volumes: Mapping[str, tuple[str, str]]
    marks: Mapping[str, str]
    nvram: str = ""


def new_domain_xml(xml: str, new: NewDomain) -> str:
    """The XML to define. ValueError for what is no domain's."""
    root = parsed(xml)
    if root.tag != "domain" or root.find("devices") is None:
        raise ValueError("not a domain")
    old_name = root.findtext("name", "")
    _set_text(root, "name", new.name)
    _set_text(root, "uuid", new.uuid)
    _set_identity(root, new)
    _set_marks(root, new.marks)
    devices = root.find("devices")
    assert devices is not None
    there = {target_of(disk) for disk in devices.findall("disk")}
    for name in sorted(new.volumes.keys() - there):  # libvirt chooses the bus by the name
        ET.SubElement(ET.SubElement(devices, "disk", device="disk"), "target", dev=name)
    for disk in devices.findall("disk"):
        _set_disk(devices, disk, new)
    for interface in devices.findall("interface"):
        _remove(interface, "mac", "target")
    for graphics in devices.findall("graphics"):
        _free_ports(graphics)
    for kind in _CHARACTER_DEVICES:
        for device in devices.findall(kind):
            _set_paths(device, old_name, new.name)
    return ET.tostring(root, encoding="unicode")


def _set_text(root: ET.Element, name: str, text: str) -> None:
    node = root.find(name)
    if node is None:
        node = ET.SubElement(root, name)
    node.text = text


def _set_identity(root: ET.Element, new: NewDomain) -> None:
    generation = root.find("genid")
    if generation is not None:
        generation.text = None  # libvirt makes one
    for entry in root.iterfind("sysinfo/system/entry"):
        if entry.get("name") == "uuid":
            entry.text = new.uuid
    nvram = root.find("os/nvram")
    if nvram is not None:
        nvram.text = new.nvram or None
        nvram.attrib.pop("type", None)
        _remove(nvram, "source")


def _set_marks(root: ET.Element, marks: Mapping[str, str]) -> None:
    metadata = root.find("metadata")
    if metadata is None:
        metadata = ET.SubElement(root, "metadata")
    _remove(metadata, f"{{{MARKS_URI}}}place")
    ET.SubElement(metadata, f"{{{MARKS_URI}}}place", dict(marks))


def _set_disk(devices: ET.Element, disk: ET.Element, new: NewDomain) -> None:
    name = target_of(disk)
    _remove(disk, "source", "backingStore", "mirror", "auth", "encryption", "alias")
    if disk.get("device", "disk") not in _DISK_DEVICES:
        return
    if name not in new.volumes:
        devices.remove(disk)
        return
    path, form = new.volumes[name]
    disk.set("type", "file")
    disk.set("device", "disk")
    for only_of_luns in ("rawio", "sgio"):
        disk.attrib.pop(only_of_luns, None)
    _remove(disk, "shareable")
    ET.SubElement(disk, "source", file=path)
    driver = disk.find("driver")
    if driver is None:
        driver = ET.SubElement(disk, "driver", name="qemu")
    driver.set("type", form)
    if form != "qcow2":
        driver.attrib.pop("discard_no_unref", None)
        _remove(driver, "metadata_cache")


def _free_ports(graphics: ET.Element) -> None:
    for key in ("port", "tlsPort", "socket"):
        graphics.attrib.pop(key, None)
    graphics.set("autoport", "yes")


def _set_paths(device: ET.Element, old_name: str, new_name: str) -> None:
    """libvirt chooses an agent's socket by itself; other paths get the new name."""
    for source in device.findall("source"):
        path = source.get("path", "")
        if device.tag == "channel" and device.get("type") == "unix":
            device.remove(source)
        elif path and device.get("type") in ("file", "unix"):
            source.set("path", _renamed(path, old_name, new_name))
    log = device.find("log")
    if log is not None:
        log.set("file", _renamed(log.get("file", ""), old_name, new_name))


def _renamed(path: str, old_name: str, new_name: str) -> str:
    directory, base = os.path.split(path)
    if old_name and old_name in base:
        return os.path.join(directory, base.replace(old_name, new_name))
    return os.path.join(directory, f"{new_name}-{base}")


def _remove(parent: ET.Element, *names: str) -> None:
    for name in names:
        for node in parent.findall(name):
            parent.remove(node)
