"""Making and deleting VMs of the embedded inventory, and their volumes.

create: volumes first, then the record; what was made is removed if the record is refused. One call
at a time has a volume, so that nobody takes over what another one is about to remove again. And one
at a time is in a pool: one that does not answer holds a single thread, and holds up no other pool.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from engine.core import Core
from engine.errors import Conflict, EngineError, Invalid, PoolUnreachable
from engine.ids import new_id, normal
from engine.inventory.inventory import find, find_or_default, require_addable
from engine.inventory.scopes import landing
from engine.inventory.volumes import (
    MOST_CAPACITY_BYTES,
    make_volume,
    offered_type,
    pool_room,
    remove_volume,
    require_plain_name,
    volume_size,
)
from engine.model import Disk, Pool, Vm
from engine.snapshot.baseline_tending import tend_baselines
from engine.verb_types import NewDisk, Scope
from storage.format.record import DISKS_LIMIT

log = logging.getLogger(__name__)

MOST_NAME_CHARS = 200
POOL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Planned:
    pool: Pool
    disk: Disk
    make: bool


def create_vm(
    core: Core,
    scope: Scope,
    name: str,
    zone_uuid: str,
    object_group: str,
    disks: Sequence[NewDisk],
) -> str:
    """The new VM's uuid. Invalid, NotFound, Conflict, PoolFull, PoolUnreachable: nothing made."""
    if not core.inventory.makes_vms:
        raise Conflict("managed_by_libvirt", "VMs are made with libvirt, and show up here then")
    if not 0 < len(name) <= MOST_NAME_CHARS:
        raise Invalid("compute_name", f"has to have 1 to {MOST_NAME_CHARS} characters")
    places = core.inventory.places
    cluster, namespace = landing(places, scope)
    with _volumes_taken(core, ((disk.pool_uuid, disk.volume_name) for disk in disks)):
        planned = _plan_disks(core, disks)
        vm = Vm(
            uuid=new_id(),
            name=name,
            cluster_uuid=cluster.uuid,
            tenant=namespace.tenant,
            namespace=namespace.uuid,
            zone_uuid=find_or_default("zone", places.zones, normal(zone_uuid)).uuid,
            object_group=find_or_default(
                "object_group", places.object_groups, normal(object_group)
            ).uuid,
            disks=tuple(one.disk for one in planned),
            vm_type=scope.vm_type,
        )
        require_addable(vm, core.inventory.vms())
        _make(core, vm, [one for one in planned if one.make])
    log.info("vm_created", extra={"vm": vm.uuid})
    return vm.uuid


def delete_vm(core: Core, scope: Scope, uuid: str, delete_volumes: bool) -> None:
    """Deletes the record, and, if asked, those of its volumes that no other VM has. Backups stay.

    NotFound, Conflict(vm_busy), Conflict(name_taken) when what has a volume's name is no file,
    PoolUnreachable when a pool does not answer: nothing was deleted. PoolUnreachable that says so:
    volumes could not be removed, which are no VM's any more.
    """
    vm = core.vm_in(scope, uuid)
    disks = vm.disks if delete_volumes else ()
    with _volumes_taken(core, ((disk.pool_uuid, disk.volume_name) for disk in disks)):
        if delete_volumes:
            for pool, name in _own_volumes(core, vm):
                with _turn(core, pool):
                    volume_size(pool, name)
        vm = core.inventory.remove_vm(vm.uuid)
        log.info("vm_deleted", extra={"vm": vm.uuid})
        if delete_volumes:
            _remove_volumes(core, vm)
    tend_baselines(core)


def _require_answering(core: Core, pool_uuids: Iterable[str]) -> None:
    """NotFound, PoolUnreachable."""
    pools = core.inventory.places.pools
    for uuid in dict.fromkeys(map(normal, pool_uuids)):
        pool = find("pool", pools, uuid)
        try:
            core.probes.ask(f"pool {uuid}", partial(pool_room, pool), POOL_TIMEOUT_S)
        except TimeoutError as error:
            raise PoolUnreachable(f"pool {pool.name}: {error}") from None


@contextlib.contextmanager
def _volumes_taken(core: Core, volumes: Iterable[tuple[str, str]]) -> Iterator[None]:
    """No other call has these (pool, name) inside the block. NotFound; PoolUnreachable when a pool
    does not answer, or who has one of them hangs."""
    names = sorted({(normal(uuid), name) for uuid, name in volumes})  # all in one order
    _require_answering(core, (uuid for uuid, _ in names))
    with contextlib.ExitStack() as turns:
        for uuid, name in names:
            pool = find("pool", core.inventory.places.pools, uuid)
            turns.enter_context(_turn(core, pool, name))
        yield


def _turn(core: Core, pool: Pool, volume: str | None = None) -> AbstractContextManager[None]:
    """At the pool, or at a volume of it. PoolUnreachable."""
    key, what = (pool.uuid, "it") if volume is None else (f"{pool.uuid}/{volume}", repr(volume))
    detail = f"another call has waited for {what} for {POOL_TIMEOUT_S:g} s; ask again"
    return core.turns.one(key, POOL_TIMEOUT_S, PoolUnreachable(f"pool {pool.name}: {detail}"))


def _plan_disks(core: Core, disks: Sequence[NewDisk]) -> list[_Planned]:
    if len(disks) > DISKS_LIMIT:
        raise Invalid("disks", f"has {len(disks)} entries; {DISKS_LIMIT} are the limit")
    if len({disk.target_device for disk in disks}) != len(disks):
        raise Invalid("disks", "names a target_device twice")
    if len({(normal(disk.pool_uuid), disk.volume_name) for disk in disks}) != len(disks):
        raise Invalid("disks", "names a volume twice")
    return [_plan_disk(core, disk) for disk in disks]


def _plan_disk(core: Core, want: NewDisk) -> _Planned:
    if not want.target_device:
        raise Invalid("target_device", "is empty")
    require_plain_name(want.volume_name)
    pool = find("pool", core.inventory.places.pools, normal(want.pool_uuid))
    usd_type = offered_type(pool, want.usd_type)
    with _turn(core, pool):
        size_bytes = volume_size(pool, want.volume_name)
    capacity = want.capacity if size_bytes is None else size_bytes
    if capacity is None or not 0 < capacity <= MOST_CAPACITY_BYTES:
        raise Invalid("capacity", f"of {want.volume_name!r}: has to be given, and above 0")
    disk = Disk(
        target_device=want.target_device,
        pool_uuid=pool.uuid,
        volume_name=want.volume_name,
        capacity=capacity,
        usd_type=usd_type,
        replica=want.replica or pool.replica,
        share=want.share,
    )
    return _Planned(pool, disk, make=size_bytes is None)


def _make(core: Core, vm: Vm, planned: Sequence[_Planned]) -> None:
    made: list[_Planned] = []
    try:
        for one in planned:
            with _turn(core, one.pool):
                make_volume(one.pool, one.disk.volume_name, one.disk.capacity)
            made.append(one)
        core.inventory.add_vm(vm)
    except BaseException:
        for one in made:
            _remove_again(one)
        raise


def _remove_again(planned: _Planned) -> None:
    try:
        remove_volume(planned.pool, planned.disk.volume_name)
    except EngineError:
        log.exception("volume_kept", extra={"volume": planned.disk.volume_name})


def _remove_volumes(core: Core, vm: Vm) -> None:
    kept = []
    for pool, name in _own_volumes(core, vm):
        try:
            with _turn(core, pool):
                remove_volume(pool, name)
        except EngineError as error:
            kept.append(f"{name} ({error})")
    if kept:
        raise PoolUnreachable(f"the VM is deleted, but not its volumes {', '.join(kept)}")


def _own_volumes(core: Core, vm: Vm) -> list[tuple[Pool, str]]:
    """Those that no other VM has."""
    used = {
        (disk.pool_uuid, disk.volume_name)
        for other in core.inventory.vms()
        if other.uuid != vm.uuid
        for disk in other.disks
    }
    pools = core.inventory.places.pools
    return [
        (find("pool", pools, disk.pool_uuid), disk.volume_name)
        for disk in vm.disks
        if (disk.pool_uuid, disk.volume_name) not in used
    ]
