"""A guest finds what it left in its firmware's variables and in its TPM, in the restored domain.

It boots by UEFI (OVMF), and talks to the TPM (swtpm) itself, in the TPM's own words.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine_rig import EngineRig
from tests.libvirt.guest import Guest, GuestFailed
from tests.libvirt.host import MIB, Host
from tests.libvirt.site import config_for, wait_for_vm
from tests.nfs.kit import Kit

_FIRMWARE = Path("/usr/share/OVMF")
_MEMORY_KIB = 256 << 10
_WITH_NVRAM = 1 << 2
_VARIABLE = "/sys/firmware/efi/efivars/Kept-6a1b43f5-0b6e-4f0e-9d3c-1f2e3d4c5b6a"
_VALUE = b"from the guest"
_SECRET = b"sealed up"

# Commands of the TPM 2.0 specification, part 3. All are authorized by the owner's empty password.
_OWNER = bytes.fromhex("40000001")
_INDEX = bytes.fromhex("01500016")
_PASSWORD = bytes.fromhex("00000009 40000009 0000 00 0000")
_SHA256 = b"\0\x0b"
_READ_WRITE = bytes.fromhex("00060006")


@pytest.fixture
def rig(host: Host, tmp_path: Path) -> Iterator[EngineRig]:
    for tool, package in (("swtpm", "swtpm"), ("swtpm_setup", "swtpm-tools")):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (Debian package {package})")
    if not (_FIRMWARE / "OVMF_CODE_4M.fd").exists():
        pytest.skip("needs firmware for UEFI (Debian package ovmf)")
    tpm_directory = host.root / "config/libvirt/qemu/swtpm"
    config = config_for(host.uri, scratch=host.scratch, tpm_directory=tpm_directory)
    with EngineRig(tmp_path / "data", config) as made:
        yield made


def test_a_guest_finds_both_in_the_restored_domain(host: Host, rig: EngineRig, kit: Kit) -> None:
    pool = host.connection.storagePoolDefineXML(
        f"<pool type='dir'><name>p</name><target><path>{host.root}/images</path></target></pool>"
    )
    pool.create()
    domain = defined(host, kit)
    guest = host.boot(domain)
    wait_for_vm(rig, "sealed", lambda vm: vm is not None and vm.state == "running")
    mount_variables(guest)
    guest.run(f"{printed(bytes([7, 0, 0, 0]) + _VALUE)} > {_VARIABLE}")
    with pytest.raises(GuestFailed):
        tpm(guest, read_index())  # there is none before
    size = len(_SECRET).to_bytes(2)
    index = _INDEX + _SHA256 + _READ_WRITE + b"\0\0" + size
    tpm(guest, command(0x12A, _OWNER, len(index).to_bytes(2).rjust(4, b"\0") + index))
    tpm(guest, command(0x137, _OWNER + _INDEX, size + _SECRET + b"\0\0"))
    assert _SECRET in tpm(guest, read_index())
    backup = rig.back_up(wait_for_vm(rig, "sealed", lambda vm: vm is not None))
    assert not [note for note in backup.label.notes if "not in the backup" in note]
    guest.close()
    domain.destroy()
    domain.undefineFlags(_WITH_NVRAM)  # its variables and its TPM go with it

    vm_uuid, job = rig.ask_restore(backup, "unsealed")
    rig.succeed(job)
    restored: Any = host.connection.lookupByUUIDString(vm_uuid)
    guest = host.boot(restored)
    mount_variables(guest)
    found = bytes.fromhex(guest.run(f"od -An -v -tx1 {_VARIABLE}"))
    assert found == bytes([7, 0, 0, 0]) + _VALUE
    assert _SECRET in tpm(guest, read_index())
    guest.close()
    restored.destroy()
    restored.undefineFlags(_WITH_NVRAM)


def defined(host: Host, kit: Kit) -> Any:
    shutil.copy(kit.packed, host.root / "vmlinuz")
    packed = gzip.compress((host.root / "initrd").read_bytes(), 1)
    (host.root / "initrd.gz").write_bytes(packed)  # the firmware measures it, byte by byte
    host.own(host.root / "vmlinuz", host.root / "initrd.gz")
    plain = host.define("sealed", [host.image("vda", "sealed.raw", MIB, "raw")], agent=False)
    xml = plain.XMLDesc()
    for old, new in (
        ("196608</memory>", f"{_MEMORY_KIB}</memory>"),
        ("196608</currentMemory>", f"{_MEMORY_KIB}</currentMemory>"),
        ("<cmdline>quiet ", "<cmdline>console=ttyS0 "),  # hangs if it has nowhere to write
        (f"{host.root}/vmlinux", f"{host.root}/vmlinuz"),
        (f"{host.root}/initrd", f"{host.root}/initrd.gz"),
        (
            "</type>",
            f"</type><loader readonly='yes' type='pflash'>{_FIRMWARE}/OVMF_CODE_4M.fd</loader>"
            f"<nvram template='{_FIRMWARE}/OVMF_VARS_4M.fd'>{host.root}/sealed.vars</nvram>",
        ),
        (
            "</devices>",
            "<tpm model='tpm-crb'><backend type='emulator' version='2.0'>"
            "<active_pcr_banks><sha256/></active_pcr_banks></backend></tpm></devices>",
        ),
    ):
        assert old in xml
        xml = xml.replace(old, new)
    return host.connection.defineXML(xml)


def mount_variables(guest: Guest) -> None:
    guest.run("mount -t efivarfs efivarfs /sys/firmware/efi/efivars")


def command(code: int, handles: bytes, parameters: bytes) -> bytes:
    """One with a session; the password is that."""
    body = code.to_bytes(4) + handles + _PASSWORD + parameters
    return b"\x80\x02" + (6 + len(body)).to_bytes(4) + body


def read_index() -> bytes:
    return command(0x14E, _OWNER + _INDEX, len(_SECRET).to_bytes(2) + b"\0\0")


def tpm(guest: Guest, request: bytes) -> bytes:
    """The answer. GuestFailed if it is an error."""
    ask = f"{printed(request)} >&3; dd bs=4096 count=1 <&3 2>/dev/null | od -An -v -tx1"
    answer = bytes.fromhex(guest.run(f"exec 3<>/dev/tpm0; {ask}"))
    if answer[6:10] != bytes(4):
        raise GuestFailed(f"the TPM says {answer.hex()}")
    return answer


def printed(content: bytes) -> str:
    """The shell's words for these bytes, written in one piece."""
    return "printf '" + "".join(f"\\{byte:03o}" for byte in content) + "'"
