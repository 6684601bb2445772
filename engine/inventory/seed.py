"""Settles, at the start, what there is: from the configuration, else the embedded default.

For each kind that the configuration lists, it lists all of that kind; a kind that it leaves out is
the embedded default's single one. Uuids are the configured ones, or those that the thing of that
name had before, or fresh: made once, and kept in the state, also while that name is not listed: a
start with a wrong configuration costs nothing once the right one is back. VMs and points that were
made through the API stay beside the configured ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from msgspec.structs import replace

from engine.config import (
    ClusterConfig,
    Config,
    DiskConfig,
    NamespaceConfig,
    ObjectGroupConfig,
    PointConfig,
    PoolConfig,
    TenantConfig,
    VmConfig,
    ZoneConfig,
)
from engine.errors import ConfigInvalid, EngineError, Invalid
from engine.ids import canonical, new_id
from engine.inventory.inventory import (
    DEFAULT_NAME,
    Named,
    Places,
    PlaceT,
    called,
    default_of,
    require_addable,
)
from engine.inventory.volumes import (
    Directory,
    DirectoryId,
    directories_above,
    directory_ids,
    require_plain_name,
)
from engine.model import BackupPoint, Cluster, Disk, Namespace, ObjectGroup, Pool, Tenant, Vm, Zone
from engine.probes import Probes
from engine.state import Rows, State

SizeOf: TypeAlias = Callable[[Pool, str, str], int | None]  # of a volume, by its name and format
_Which: TypeAlias = Mapping[str, DirectoryId]
WantedT = TypeVar("WantedT", bound=Named)
KnownT = TypeVar("KnownT", Cluster, Tenant, Namespace, Zone, ObjectGroup, Pool)


def settle_places(
    state: State, config: Config, data: str, default_pool_path: str, probes: Probes
) -> Places:
    """What there is, as configured; recorded in the state. ConfigInvalid names what is wrong.

    data: the data directory, in which only the default pool may be.
    """
    clusters = _settle(
        "clusters",
        state.clusters,
        config.clusters or (ClusterConfig(DEFAULT_NAME),),
        lambda want, uuid: Cluster(uuid=uuid, name=want.name, mode=want.mode),
    )
    pools = _wanted_pools(config, default_pool_path)
    _require_listed_once(config.points)
    points: list[PointConfig | BackupPoint] = [*config.points, *state.points.values()]
    paths = [*(one.path for one in (*pools, *points)), default_pool_path, data]
    which = directory_ids(probes, map(os.path.normpath, paths))
    _require_apart(pools, which)
    found = directories_above(probes, [pool.path for pool in pools])
    above = {pool.name: found[pool.path] for pool in pools}
    for point in points:
        _require_outside(above, f"backup point {point.name!r}", _names(point.path, which))
    inside = _names(default_pool_path, which)
    others = {name: directories for name, directories in above.items() if not directories & inside}
    _require_outside(others, "data directory", _names(data, which))
    tenants = _settle(
        "tenants",
        state.tenants,
        config.tenants or (TenantConfig(DEFAULT_NAME),),
        lambda want, uuid: Tenant(uuid=uuid, name=want.name),
    )
    return Places(
        clusters=clusters,
        tenants=tenants,
        namespaces=_settle(
            "namespaces",
            state.namespaces,
            config.namespaces or (NamespaceConfig(DEFAULT_NAME),),
            lambda want, uuid: Namespace(
                uuid=uuid, name=want.name, tenant=refer(tenants, want.tenant, "tenant").uuid
            ),
        ),
        zones=_settle(
            "zones",
            state.zones,
            config.zones or (ZoneConfig(DEFAULT_NAME),),
            lambda want, uuid: Zone(uuid=uuid, name=want.name),
        ),
        object_groups=_settle(
            "object_groups",
            state.object_groups,
            config.object_groups or (ObjectGroupConfig(DEFAULT_NAME),),
            lambda want, uuid: ObjectGroup(uuid=uuid, name=want.name),
        ),
        pools=_settle("pools", state.pools, pools, _pool),
    )


def settle_vms(
    state: State,
    config: Config,
    places: Places,
    size_of: SizeOf,
    left_out: Sequence[Vm] = (),
) -> None:
    """Puts the configured VMs into the state, after recovery: none is in an action.

    A VM that was known keeps its uuid and its last error. `size_of` must not hang. What those
    `left_out` are called, or have, is taken by nobody.
    """
    elsewhere = {vm.uuid for vm in left_out}
    known = {vm.uuid: vm for vm in state.vms.values() if vm.uuid not in elsewhere}
    settled: set[str] = set()
    for want in config.vms:
        vm = _configured_vm(want, places, known, size_of)
        if vm.uuid in settled:
            raise ConfigInvalid(f"vms: {want.name!r} is listed twice")
        settled.add(vm.uuid)
        others = [other for other in known.values() if other.uuid != vm.uuid]
        try:
            require_addable(vm, others)
        except EngineError as error:
            hint = "if this is that VM, list it with its uuid"
            raise ConfigInvalid(f"vms, {want.name}: {error}; {hint}") from error
        known[vm.uuid] = vm
        state.vms.put(vm)


def _settle(
    kind: str,
    rows: Rows[KnownT],
    wanted: Sequence[WantedT],
    make: Callable[[WantedT, str], KnownT],
) -> tuple[KnownT, ...]:
    known = rows.values()
    settled: dict[str, KnownT] = {}
    for want in wanted:
        uuid = _uuid_for(kind, want, known)
        if uuid in settled or any(row.name == want.name for row in settled.values()):
            raise ConfigInvalid(f"{kind}: {want.name!r} is listed twice")
        settled[uuid] = make(want, uuid)
    names = {row.name for row in settled.values()}
    rows.put_all(settled.values())
    rows.delete(*(row.uuid for row in known if row.uuid not in settled and row.name in names))
    return tuple(settled.values())


def _uuid_for(kind: str, want: Named, known: Sequence[KnownT]) -> str:
    if want.uuid:
        uuid = canonical(want.uuid)
        if uuid is None:
            raise ConfigInvalid(f"{kind}: {want.name!r}: {want.uuid!r} is not a uuid")
        return uuid
    return next((row.uuid for row in known if row.name == want.name), "") or new_id()


def refer(rows: Sequence[PlaceT], name: str, what: str) -> PlaceT:
    """The row of that uuid or name; "" is the default one."""
    if not name:
        return default_of(rows)
    row = called(rows, name)
    if row is None:
        raise ConfigInvalid(f"no {what} {name!r} is listed")
    return row


def _require_listed_once(points: Sequence[PointConfig]) -> None:
    names = [want.name for want in points]
    paths = [os.path.normpath(want.path) for want in points]  # others: the uuid tells, when opened
    for listed in (names, paths):
        for one in listed:
            if listed.count(one) > 1:
                raise ConfigInvalid(f"points: {one!r} is listed twice")


def _require_apart(pools: Sequence[PoolConfig], which: _Which) -> None:
    """A volume in two pools would be two VMs'."""
    taken: dict[Directory, str] = {}
    for pool in pools:
        names = _names(pool.path, which)
        for name in names & taken.keys():
            where = f"pool {pool.name!r}: {os.path.normpath(pool.path)}"
            raise ConfigInvalid(f"{where} is the directory of pool {taken[name]!r}")
        taken |= dict.fromkeys(names, pool.name)


def _require_outside(
    above: Mapping[str, frozenset[Directory]], what: str, names: frozenset[Directory]
) -> None:
    """What is in there is ours, and no volume: a VM that has it could be deleted with it. `above`:
    what each pool is, and is in."""
    for pool, directories in above.items():
        if directories & names:
            path = next(name for name in names if isinstance(name, str))
            raise ConfigInvalid(f"{what}: {path} is the directory of pool {pool!r}, or holds it")


def _names(path: str, which: _Which) -> frozenset[Directory]:
    """A directory by its path, and by what is there if something is."""
    path = os.path.normpath(path)
    found = which.get(path)
    return frozenset({path} if found is None else {path, found})


def _wanted_pools(config: Config, default_path: str) -> tuple[PoolConfig, ...]:
    if config.inventory == "libvirt":
        return config.pools  # libvirt has more
    return config.pools or (PoolConfig(DEFAULT_NAME, default_path),)


def _pool(want: PoolConfig, uuid: str) -> Pool:
    return Pool(
        uuid=uuid,
        name=want.name,
        path=os.path.normpath(want.path),
        usd_types=want.usd_types,
        replica=want.replica,
        format=want.format,
    )


def _configured_vm(want: VmConfig, places: Places, known: dict[str, Vm], size_of: SizeOf) -> Vm:
    cluster = refer(places.clusters, want.cluster, "cluster")
    namespace = refer(places.namespaces, want.namespace, "namespace")
    before = _known_vm(want, cluster, namespace, known)
    vm = Vm(
        uuid=before.uuid if before else (_given_uuid(want) or new_id()),
        name=want.name,
        cluster_uuid=cluster.uuid,
        tenant=namespace.tenant,
        namespace=namespace.uuid,
        zone_uuid=refer(places.zones, want.zone, "zone").uuid,
        object_group=refer(places.object_groups, want.object_group, "object_group").uuid,
        disks=tuple(_configured_disk(disk, want, places, size_of) for disk in want.disks),
        vm_type=want.vm_type,
        state=want.state,
    )
    if len({disk.target_device for disk in vm.disks}) != len(vm.disks):
        raise ConfigInvalid(f"vms, {want.name}: a target_device is listed twice")
    return replace(vm, last_error=before.last_error) if before else vm


def _given_uuid(want: VmConfig) -> str:
    if not want.uuid:
        return ""
    uuid = canonical(want.uuid)
    if uuid is None:
        raise ConfigInvalid(f"vms, {want.name}: {want.uuid!r} is not a uuid")
    return uuid


def _known_vm(
    want: VmConfig, cluster: Cluster, namespace: Namespace, known: dict[str, Vm]
) -> Vm | None:
    uuid = _given_uuid(want)
    if uuid:
        return known.get(uuid)
    place = (cluster.uuid, namespace.uuid, want.name)
    for vm in known.values():
        if (vm.cluster_uuid, vm.namespace, vm.name) == place:
            return vm
    return None


def _configured_disk(want: DiskConfig, vm: VmConfig, places: Places, size_of: SizeOf) -> Disk:
    pool = refer(places.pools, want.pool, "pool")
    usd_type = want.usd_type or pool.usd_types[0]
    if usd_type not in pool.usd_types:
        raise ConfigInvalid(f"vms, {vm.name}: pool {pool.name} offers no {usd_type!r}")
    try:
        require_plain_name(want.volume_name)
        capacity = size_of(pool, want.volume_name, want.format)
    except Invalid as error:
        raise ConfigInvalid(f"vms, {vm.name}: {error}") from error
    except EngineError:
        capacity = None  # an unreachable pool is no reason not to start: a backup will tell
    return Disk(
        target_device=want.target_device,
        pool_uuid=pool.uuid,
        volume_name=want.volume_name,
        capacity=capacity or 0,
        usd_type=usd_type,
        replica=want.replica or pool.replica,
        share=want.share,
        format=want.format,
    )
