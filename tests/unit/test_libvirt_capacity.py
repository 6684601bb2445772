"""Whom libvirt's disks are asked for their size: a running QEMU only where nobody else knows."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from engine.libvirt.binding import LibvirtFault
from engine.libvirt.capacity import capacity_of
from engine.libvirt.domains import DomainDisk, read_domain

QCOW2 = struct.pack(">4sIQIIQI", b"QFI\xfb", 2, 0, 0, 16, (5 << 30) + 100, 0) + bytes(512)
BY_LIBVIRT = 777


class FakeDomain:
    """`job`: libvirt's number of what it does."""

    def __init__(self, job: int = 0, *, away: bool = False) -> None:
        self._job, self._away = job, away
        self.asked: list[str] = []

    def jobInfo(self) -> list[int]:
        if self._away:
            raise LibvirtFault("gone")
        return [self._job]

    def blockInfo(self, target: str) -> list[int]:
        if self._away:
            raise LibvirtFault("gone")
        self.asked.append(target)
        return [BY_LIBVIRT, 0, 0]


def size_of(domain: Any, disk: DomainDisk, *, active: bool = True) -> int:
    return capacity_of(domain, disk, active=active)


@pytest.mark.parametrize(
    ("form", "content", "size_bytes"),
    [("raw", bytes(1000), 1024), ("raw", bytes(4096), 4096), ("qcow2", QCOW2, 5 << 30)],
)
def test_a_running_domains_file_is_asked_itself(
    tmp_path: Path, form: str, content: bytes, size_bytes: int
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(content)
    domain = FakeDomain()
    assert size_of(domain, DomainDisk("vda", "file", str(path), form)) == size_bytes
    assert domain.asked == []


@pytest.mark.parametrize(
    "disk",
    [
        DomainDisk("vda", "file", "/nowhere/at/all"),
        DomainDisk("vda", "network", "pool/image"),
        DomainDisk("vda", "file", "{file}", "vmdk"),
        DomainDisk("vda", "file", "{file}", "qcow2"),  # which it is not
        DomainDisk("vda", "file", "{file}", framed=True),
    ],
)
def test_what_only_qemu_knows_is_asked_for_while_it_does_no_job(
    tmp_path: Path, disk: DomainDisk
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    disk = DomainDisk(
        disk.target, disk.kind, disk.source.format(file=path), disk.format, framed=disk.framed
    )
    idle, busy, away = FakeDomain(), FakeDomain(job=2), FakeDomain(away=True)
    assert size_of(idle, disk) == BY_LIBVIRT
    assert size_of(busy, disk) == 0
    assert busy.asked == []
    assert size_of(away, disk) == 0


def test_libvirt_itself_looks_at_a_stopped_domains_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    assert size_of(FakeDomain(), DomainDisk("vda", "file", str(path)), active=False) == BY_LIBVIRT


@pytest.mark.parametrize(
    ("inside", "framed"),
    [
        ("<source file='/d'/>", False),
        ("<source file='/d'><encryption format='luks'/></source>", True),
        ("<source file='/d'/><encryption format='luks'/>", True),
        ("<source file='/d'><slices><slice type='storage' offset='0'/></slices></source>", True),
    ],
)
def test_a_disk_inside_its_medium_is_recognised(inside: str, framed: bool) -> None:
    facts = read_domain(
        f"<domain><devices><disk type='file' device='disk'>{inside}<target dev='vda'/></disk>"
        "</devices></domain>"
    )
    assert [disk.framed for disk in facts.disks] == [framed]
