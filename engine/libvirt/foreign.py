"""What of a machine that another cluster has kept may be made on this host.

Whoever may write to a backup point may put there what they like, and libvirt does what a domain's
XML says with more rights than theirs: it runs the emulator and the scripts that are named there,
opens files, hands out devices. So an import keeps what makes up the virtual machine itself, and of
the host nothing but the networks that it is on. What is not known to be harmless is left out.

The names are those of libvirt's domain format (https://libvirt.org/formatdomain.html). libvirt and
we have to read the same in it. So nothing stays of what the two understand differently: a second
element where there is to be one, names in a namespace (libvirt takes them for its own), elements in
a text, a document type.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator

from msgspec.structs import replace

from engine.errors import DiskServerRefused
from engine.libvirt.domains import parsed
from engine.libvirt.machine import MOST_NVRAM_BYTES, deflated, inflated, inflated_bytes
from engine.model import Machine
from engine.qemu.header import parse_header

FIRMWARE_DIRECTORY = "/usr/share/"  # the system's packages have theirs below it
_IN_EVERY_DOMAIN = frozenset({"emulator", "metadata", "resource", "seclabel", "on_crash", "audio"})

_MOST_NOTE_CHARS = 200

_OF_DOMAIN = frozenset(
    {"name", "uuid", "genid", "title", "description", "on_poweroff", "on_reboot", "pm", "clock"}
    | {"memory", "currentMemory", "maxMemory", "vcpu", "vcpus", "iothreads", "cpu", "features"}
    | {"os", "sysinfo", "devices"}
)
_OF_OS = frozenset({"type", "boot", "bootmenu", "bios", "smbios", "firmware", "loader", "nvram"})
_OF_DISK = frozenset(
    {"driver", "target", "address", "boot", "serial", "wwn", "vendor", "product"}
    | {"readonly", "shareable", "iotune", "geometry", "blockio"}
)
_OF_INTERFACE = frozenset({"source", "model", "address", "boot", "link", "filterref"})
_OF_SWITCH_PORT = frozenset({"virtualport", "vlan"})  # named: without them it may reach nothing
_OF_CHARACTER_DEVICE = frozenset({"target", "address"})
_OF_MEMORY = frozenset({"target", "address"})
_SEVERAL = frozenset({"boot", "codec", "sysinfo"})  # all others are in their parent once


def harmless(machine: Machine) -> tuple[Machine | None, tuple[str, ...]]:
    """(what may be kept of it, notes for the backup)."""
    text = inflated(machine.xml)
    try:
        if "<!DOCTYPE" in text:
            raise ValueError("entities may be any number of times as long as what names them")
        root = parsed(text)
        left_out = {tag.rpartition("}")[2] for tag in _stripped(root)} - _IN_EVERY_DOMAIN
        xml = deflated(ET.tostring(root))
        if not xml:
            raise ValueError("too large for a label")
    except (ValueError, RecursionError):
        return None, ("the domain's XML is left out: it is no domain's, or too large",)
    notes, nvram = list[str](), machine.nvram
    if left_out:
        what = ", ".join(sorted(left_out))[:_MOST_NOTE_CHARS]
        notes.append(f"the domain is another cluster's; left out of its XML: {what}")
    if _stands_on_files(nvram):
        nvram = b""
        notes.append("the firmware's variables are left out: they are in other files")
    # The checkpoint says what the disks have in common with the backup. Only our own word counts.
    return replace(machine, xml=xml, checkpoint=b"", nvram=nvram), tuple(notes)


def _stands_on_files(nvram: bytes) -> bool:
    """They have the loader's format, which may be qcow2. No firmware's name other files."""
    try:
        header = parse_header(inflated_bytes(nvram, MOST_NVRAM_BYTES), "nvram")
    except DiskServerRefused:
        return False  # QEMU refuses it as well
    return bool(header.backing) or header.external_data


def _stripped(root: ET.Element) -> Iterator[str]:
    """Takes out what may not stay; its names. ValueError for what is no domain."""
    devices = root.find("devices")
    if root.tag != "domain" or devices is None:
        raise ValueError("not a domain")
    _keep_attributes(root, "type")
    yield from _keep_children(root, _OF_DOMAIN)
    _strip_namespaces(root)
    for os_node in root.findall("os"):
        yield from _keep_children(os_node, _OF_OS)
        yield from _strip_firmware(os_node)
    for sysinfo in root.findall("sysinfo"):
        if sysinfo.get("type") != "smbios":
            root.remove(sysinfo)
            yield "sysinfo"
    yield from (node.tag for node in devices.iterfind("interface/*") if node.tag in _OF_SWITCH_PORT)
    for device in list(devices):
        strip = _DEVICES.get(device.tag)
        if strip is None or not strip(device):
            devices.remove(device)
            yield device.tag


def _keep_attributes(node: ET.Element, *names: str) -> None:
    for name in set(node.attrib) - set(names):
        del node.attrib[name]


def _keep_children(node: ET.Element, names: frozenset[str]) -> Iterator[str]:
    there = set[str]()
    for child in list(node):
        if child.tag not in names or child.tag in there - _SEVERAL:
            node.remove(child)
            yield child.tag
        there.add(child.tag)


def _strip_namespaces(root: ET.Element) -> None:
    for node in root.iter():
        _keep_attributes(node, *(name for name in node.attrib if not name.startswith("{")))
        for child in [child for child in node if child.tag.startswith("{")]:
            node.remove(child)


def _strip_firmware(os_node: ET.Element) -> Iterator[str]:
    """A loader stays that the system's packages have; else libvirt chooses one like it."""
    for loader in os_node.findall("loader"):
        list(_keep_children(loader, frozenset()))  # the text behind one is of the path, too
        path = (loader.text or "").strip()
        if path and not os.path.normpath(path).startswith(FIRMWARE_DIRECTORY):
            os_node.remove(loader)
            if loader.get("type") == "pflash":
                os_node.set("firmware", "efi")
            yield "loader"
        else:
            loader.set("readonly", "yes")
    for nvram in os_node.findall("nvram"):
        nvram.clear()


# Devices: each strips one of a kind, and says whether the rest of it may stay.


def _whole(_device: ET.Element) -> bool:
    return True


def _disk(disk: ET.Element) -> bool:
    """Its source is the restored volume's, or none: see engine.libvirt.revive."""
    _keep_attributes(disk, "device")
    disk.set("type", "file")
    list(_keep_children(disk, _OF_DISK))
    return True


def _interface(interface: ET.Element) -> bool:
    """On one of the host's networks. Not one by QEMU itself ("user"): it leads to what listens on
    the host's loopback, our own API included. No MTU, for a bridge takes the least of its ports'.
    """
    if interface.get("type") not in ("network", "bridge"):
        return False
    _keep_attributes(interface, "type")
    list(_keep_children(interface, _OF_INTERFACE))
    for source in interface.findall("source"):
        _keep_attributes(source, "network", "bridge", "portgroup")
        list(_keep_children(source, frozenset()))
    return True


def _input(device: ET.Element) -> bool:
    return device.get("type") in ("tablet", "mouse", "keyboard") and _bare(device)


def _bare(device: ET.Element) -> bool:
    list(_keep_children(device, frozenset({"address"})))
    return True


def _graphics(graphics: ET.Element) -> bool:
    """On the host's default address, without a password: a stranger's protects nobody."""
    if graphics.get("type") not in ("vnc", "spice"):
        return False
    _keep_attributes(graphics, "type", "keymap")
    if "/" in graphics.get("keymap", ""):  # QEMU opens what is a file
        del graphics.attrib["keymap"]
    list(_keep_children(graphics, frozenset()))
    return True


def _video(video: ET.Element) -> bool:
    list(_keep_children(video, frozenset({"model", "address"})))
    for model in video.findall("model"):
        list(_keep_children(model, frozenset()))
    return True


def _sound(sound: ET.Element) -> bool:
    list(_keep_children(sound, frozenset({"codec", "address"})))
    return True


def _watchdog(watchdog: ET.Element) -> bool:
    """It resets the guest, and does not fill the host's disk with its memory."""
    _keep_attributes(watchdog, "model")
    return _bare(watchdog)


def _rng(rng: ET.Element) -> bool:
    list(_keep_children(rng, frozenset({"rate", "address"})))
    ET.SubElement(rng, "backend", model="random").text = "/dev/urandom"
    return True


def _tpm(tpm: ET.Element) -> bool:
    backend = tpm.find("backend")
    if backend is None or backend.get("type") != "emulator":
        return False
    version = backend.get("version", "2.0")
    list(_keep_children(tpm, frozenset({"address"})))
    ET.SubElement(tpm, "backend", type="emulator", version=version)
    return True


def _character_device(device: ET.Element) -> bool:
    """A serial line or the like that leads to no file, socket or host: to a terminal of its own."""
    device.attrib.clear()
    device.set("type", "pty")
    list(_keep_children(device, _OF_CHARACTER_DEVICE))
    return True


def _channel(channel: ET.Element) -> bool:
    """An agent's. libvirt makes its socket, as root and in the place of what is there, under the
    target's name in a directory of its own."""
    target = channel.find("target")
    if channel.get("type") not in ("unix", "spicevmc") or target is None:
        return False
    _keep_attributes(channel, "type")
    list(_keep_children(channel, _OF_CHARACTER_DEVICE))
    return target.get("type") == "virtio" and "/" not in target.get("name", "")


def _memory(memory: ET.Element) -> bool:
    list(_keep_children(memory, _OF_MEMORY))
    return memory.get("model") == "dimm"


_DEVICES: dict[str, Callable[[ET.Element], bool]] = {
    "channel": _channel,
    "console": _character_device,
    "controller": _whole,
    "disk": _disk,
    "graphics": _graphics,
    "hub": _whole,
    "input": _input,
    "interface": _interface,
    "iommu": _whole,
    "memballoon": _whole,
    "memory": _memory,
    "panic": _whole,
    "parallel": _character_device,
    "rng": _rng,
    "serial": _character_device,
    "sound": _sound,
    "tpm": _tpm,
    "video": _video,
    "watchdog": _watchdog,
}
