"""From what is seen on a libvirt host to the rows of the inventory.

A file lives in the pool of its directory: a storage pool, or, where libvirt has none, one that is
named by the directory (directories.py). What is no plain file in a directory (a block device, a
network disk) has no pool; its name is its source. Where a VM belongs: its marks, then the first
rule that matches its name, then the default. A name that nobody configured counts as none, and is
told in the log.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence

from engine.config import LibvirtRule
from engine.ids import normal
from engine.inventory.inventory import Places, PlaceT, called, default_of
from engine.inventory.volumes import name_fault
from engine.libvirt.domains import DomainDisk, PoolFacts
from engine.libvirt.watch import DomainSeen, Sight
from engine.model import Disk, Pool, Vm

log = logging.getLogger(__name__)


def directories_of(sight: Sight) -> list[str]:
    """Where its domains' disks lie without being in a storage pool; each once."""
    pools = {facts.path for facts in sight.pools}
    disks = (disk for seen in sight.domains for disk in seen.facts.disks)
    found = dict.fromkeys(_directory(disk) for disk in disks)
    return [directory for directory in found if directory and directory not in pools]


def pools_of(host: str, sight: Sight, directories: Iterable[str]) -> dict[str, Pool]:
    """By directory: the host's storage pools, then those of `directories` that are none."""
    pools = {facts.path: _pool(facts) for facts in sight.pools}
    for path in directories:
        pools.setdefault(path, Pool(uuid=directory_uuid(host, path), name=path, path=path))
    return pools


def directory_uuid(host: str, path: str) -> str:
    """Of a directory's pool: always the same."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"vmkeep:{host}:{path}"))


def vm_of(
    host: str,
    cluster_uuid: str,
    seen: DomainSeen,
    places: Places,
    pools: Mapping[str, Pool],
    rules: Sequence[LibvirtRule],
) -> Vm | None:
    """The VM's row; None if its marks or a rule leave it out."""
    facts = seen.facts
    marks = _rule_marks(facts.name, rules) | facts.marks
    if marks.get("leave_out", "no").lower() in ("yes", "true", "1"):
        return None
    namespace = _named(places.namespaces, marks.get("namespace", ""), facts.name)
    return Vm(
        uuid=normal(facts.uuid),
        name=facts.name,
        cluster_uuid=cluster_uuid,
        tenant=namespace.tenant,
        namespace=namespace.uuid,
        zone_uuid=_named(places.zones, marks.get("zone", ""), facts.name).uuid,
        object_group=_named(places.object_groups, marks.get("object_group", ""), facts.name).uuid,
        disks=tuple(_disk(disk, seen, pools) for disk in facts.disks),
        vm_type=marks.get("vm_type", ""),
        state=seen.state,
        host=host,
    )


def _pool(facts: PoolFacts) -> Pool:
    return Pool(uuid=normal(facts.uuid), name=facts.name, path=facts.path)


def _directory(disk: DomainDisk) -> str:
    """Of a disk that is a plain file; else ""."""
    directory, name = os.path.split(disk.source)
    plain = disk.kind == "file" and directory.startswith("/") and not name_fault(name)
    return directory if plain else ""


def _disk(disk: DomainDisk, seen: DomainSeen, pools: Mapping[str, Pool]) -> Disk:
    directory = _directory(disk)
    pool = pools.get(directory)
    return Disk(
        target_device=disk.target,
        pool_uuid=pool.uuid if pool else "",
        volume_name=os.path.basename(disk.source) if pool else disk.source,
        capacity=seen.capacities.get(disk.target, 0),
        usd_type=pool.usd_types[0] if pool else "",
        share=disk.share,
        format=disk.format,
    )


def _rule_marks(name: str, rules: Sequence[LibvirtRule]) -> dict[str, str]:
    for rule in rules:
        if fnmatch.fnmatchcase(name, rule.match):
            marks = {
                "namespace": rule.namespace,
                "zone": rule.zone,
                "object_group": rule.object_group,
                "vm_type": rule.vm_type,
                "leave_out": "yes" if rule.leave_out else "",
            }
            return {key: value for key, value in marks.items() if value}
    return {}


def _named(rows: Sequence[PlaceT], name: str, domain: str) -> PlaceT:
    row = called(rows, name) if name else None
    if name and row is None:
        log.warning("place_unknown", extra={"domain": domain, "place": name})
    return row or default_of(rows)
