"""Large states, made quickly through the real code: only the flushing to the medium is left out."""

from __future__ import annotations

import json
import os
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path

import msgspec

from engine.catalogue.labels import encode_label
from engine.model import BackupLabel, DiskBackup
from storage.domain.domain import Domain
from storage.domain.session import NewBackup
from storage.files.fs import OsFs
from storage.format.bundles import stretch_of
from storage.format.paths import DomainPaths
from storage.format.record import (
    FIRST_PREVIOUS,
    BackupSeal,
    Commit,
    DiskSeal,
    FileSeal,
    Op,
    Open,
    Record,
    encode_record,
    record_digest,
)
from storage.log.log import Log, record_path
from storage.point import ClusterLabel, Point

BACKUPS_PER_RECORD = 1000
VMS = 1000
CAPACITY = 100 << 30
HOST = "bench"


class HastyFs(OsFs):
    """Does not wait for the medium: what it writes is thrown away after the run."""

    def fsync(self, fd: int) -> None:
        """Nothing."""

    def fsync_dir(self, path: str) -> None:
        """Nothing."""


def label_of(number: int, disk: str) -> bytes:
    """The label of the number-th daily backup of one of VMS VMs."""
    vm = number % VMS
    label = BackupLabel(
        vm_uuid=vm_uuid(vm),
        vm_name=f"machine {vm}",
        tenant="",
        tenant_name="default",
        namespace="",
        namespace_name="default",
        name=f"daily {number}",
        description="made by plan",
        create_time=1_700_000_000 + number * 60,
        full=True,
        disks=(DiskBackup(target_device="sda", disk_uuid=disk, capacity=CAPACITY),),
        notes=("snapshot: reflink",),
    )
    return encode_label(label)


def vm_uuid(number: int) -> str:
    return str(uuid.UUID(int=number + (4 << 76) + (2 << 62)))


def add_backups(domain: Domain, count: int) -> None:
    """That many backups of empty disks, a thousand in a record."""
    for first in range(0, count, BACKUPS_PER_RECORD):
        with domain.begin("backup") as session:
            made = []
            for number in range(first, min(first + BACKUPS_PER_RECORD, count)):
                disk = str(uuid.uuid4())
                session.manifest(disk, CAPACITY, None)
                made.append(NewBackup(str(uuid.uuid4()), label_of(number, disk), [disk]))
            session.commit(made)


def write_log(point: Point, cluster: ClusterLabel, count: int) -> None:
    """A domain whose log tells of that many backups, two records each, as backups write them.

    Its packs and manifests are not there: who lists it does not read them.
    """
    domain = point.domain(cluster, HOST, os.path.join(point.path, "unused"))
    directory = domain.paths.log
    domain.close()
    seq, previous = 0, FIRST_PREVIOUS
    for number in range(count):
        session, disk = f"{number:032x}", str(uuid.uuid4())
        seal = FileSeal(n=0, size_bytes=1 << 20, count=16, digest=bytes(16))
        backup = BackupSeal(
            backup=str(uuid.uuid4()),
            label=label_of(number, disk),
            disks=(DiskSeal(disk=disk, capacity=CAPACITY, manifest=0),),
        )
        ops: list[Op] = [
            Open(session=session, kind="backup", host=HOST, incarnation=HOST),
            Commit(session=session, packs=(seal,), manifests=(seal,), backups=(backup,)),
        ]
        for op in ops:
            seq += 1
            record = Record(seq=seq, previous=previous, nonce=bytes(16), host=HOST, ops=(op,))
            body = encode_record(record)
            previous = record_digest(body)
            path = Path(directory, record_path(seq))
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(body)


def write_bundles(point: Point, cluster: ClusterLabel) -> None:
    """Bundles what is full of a domain's log, as its hosts do by and by."""
    paths = DomainPaths(point.path, cluster.cluster_uuid)
    records = Log(HastyFs(), paths.log, paths.host_tmp(HOST))
    seq, newest = 1, records.newest_name()
    while (last := stretch_of(seq)[1]) <= newest:
        records.bundle(seq)
        seq = last + 1


class _Envelope(msgspec.Struct):
    data: msgspec.Raw


def call(url: str, path: str, body: Mapping[str, object] | None = None) -> bytes:
    """The `data` of a call's answer, as JSON. Raises OSError when it is refused."""
    raw = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}{path}", raw)) as answer:
        return bytes(msgspec.json.decode(answer.read(), type=_Envelope).data)
