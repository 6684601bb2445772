"""The Engine: every verb that the API and the command line need, on one data directory.

Synchronous and thread-safe. Verbs are quick, but for those that say "slow". Looking never touches a
backup point. The verbs themselves are in the packages: backup/backup_job.py, backup/deletion.py,
restore/restore_job.py, inventory/vms.py, points/remote.py and points/upkeep.py; this is where the
parts are put together, started and stopped.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from engine.backup import backup_job, deletion
from engine.catalogue.catalogue import Catalogue
from engine.config import Config
from engine.core import Core
from engine.errors import Conflict, EngineError, Invalid, NotFound, PoolUnreachable
from engine.host import Host
from engine.ids import normal
from engine.inventory import vms
from engine.inventory.inventory import EmbeddedInventory, Inventory, Places, pool_of
from engine.inventory.scopes import ranges
from engine.inventory.seed import SizeOf, settle_places, settle_vms
from engine.inventory.volumes import bounded_volume_size, pool_room, volume_path
from engine.jobs.hangs import Hangs
from engine.jobs.jobs import Jobs
from engine.model import (
    Backup,
    Cluster,
    Disk,
    Job,
    Namespace,
    ObjectGroup,
    Operation,
    Pool,
    Tenant,
    Vm,
    Zone,
)
from engine.oplog import OperationLog
from engine.points import remote, upkeep
from engine.points.keeper import Surroundings
from engine.points.points import Points
from engine.probes import Probes
from engine.recovery import recover
from engine.restore import restore_job
from engine.snapshot.baseline_tending import BaselineTending, tend_baselines
from engine.snapshot.baselines import Baselines
from engine.snapshot.stuns import StunState
from engine.state import State
from engine.verb_types import (
    EVERYWHERE,
    BackupPage,
    BackupQuery,
    HypervisorState,
    Maintenance,
    NewDisk,
    PointState,
    PoolState,
    RemoteBackup,
    RemoteListing,
    RestoreTarget,
    Scope,
    TrackingState,
)
from storage.files.in_flight import longest_in_flight_s

POOL_LOOK_TIMEOUT_S = 2.0
STOP_SHARE_OF_JOBS = 0.7  # of the time to stop in; the points get the rest


class Engine:
    """Made by `start`, ended by `stop`."""

    def __init__(
        self, host: Host, core: Core, operations: OperationLog, tending: BaselineTending
    ) -> None:
        self._host = host
        self._core = core
        self._operations = operations
        self._tending = tending
        self._stopped = False

    # Life -----------------------------------------------------------------------------------

    @classmethod
    def start(cls, data: str, config: Config) -> Engine:
        """Opens the data directory, cleans up what the last process left, and starts to work.

        AlreadyRunning, ConfigInvalid, StorageError; then nothing is left running.
        """
        host = Host(data)
        try:
            state = State(host.state_path)
            try:
                return cls._start(host, state, config)
            except BaseException:
                state.close()
                raise
        except BaseException:
            host.close()
            raise

    @classmethod
    def _start(cls, host: Host, state: State, config: Config) -> Engine:
        core = _assemble(host, state, config)
        try:
            core.inventory.start()
            cleared = recover(core)
            places = core.inventory.places
            sizes = _sizes(core.probes, places.pools if config.vms else ())
            settle_vms(state, config, places, sizes, core.inventory.left_out())
            core.points.start(config.points)
            if not config.points:
                core.points.make_default(host.default_point_path)
            core.jobs.start()
            core.amends.start()
            tending = BaselineTending(core, cleared)
            tending.start()
        except BaseException:
            core.amends.stop(1.0)
            core.points.stop(1.0)
            core.inventory.stop()
            raise
        return cls(host, core, OperationLog(state, core.clock), tending)

    def stop(self, timeout_s: float = 8.0) -> None:
        """Ends all jobs at their next batch, closes everything; returns within `timeout_s`.

        What hangs is left to its thread, and cleaned up by the next start.
        """
        if self._stopped:
            return
        self._stopped = True
        deadline_s = time.monotonic() + timeout_s
        self._core.jobs.stop(timeout_s * STOP_SHARE_OF_JOBS)
        self._core.amends.stop(max(deadline_s - time.monotonic(), 0.1) / 4)
        self._tending.stop(max(deadline_s - time.monotonic(), 0.1) / 2)
        self._core.points.stop(max(deadline_s - time.monotonic(), 0.1))
        self._core.inventory.stop()
        self._core.state.close()
        self._host.close()

    def state_silent_s(self) -> float:
        """For how long the data directory's disk has not answered who writes to the state; 0 when
        nobody waits for it. What there is can be asked for all the same."""
        return longest_in_flight_s(self._host.state_path)

    # What there is --------------------------------------------------------------------------

    def clusters(self) -> list[Cluster]:
        return list(self._core.inventory.places.clusters)

    def tenants(self) -> list[Tenant]:
        return list(self._core.inventory.places.tenants)

    def namespaces(self) -> list[Namespace]:
        return list(self._core.inventory.places.namespaces)

    def zones(self) -> list[Zone]:
        return list(self._core.inventory.places.zones)

    def object_groups(self) -> list[ObjectGroup]:
        return list(self._core.inventory.places.object_groups)

    def pools(self) -> list[PoolState]:
        """Each with its room; those that do not answer say so, and delay this a little."""
        pinned = Counter[str]()
        for one in self.tracking():
            pinned[os.path.dirname(one.volume)] += one.pinned_bytes
        pools = self._core.inventory.places.pools
        rooms = _rooms(self._core.probes, pools)
        return [
            replace(_seen(pool, rooms[pool.uuid]), pinned_bytes=pinned[pool.path]) for pool in pools
        ]

    def vms(self, scope: Scope) -> list[Vm]:
        """Those in scope, by name. NotFound for an unknown member of the scope."""
        covered = {
            (cluster.uuid, namespace.uuid)
            for cluster, namespace in ranges(self._core.inventory.places, scope)
        }
        found = self._core.inventory.vms()
        return [vm for vm in found if (vm.cluster_uuid, vm.namespace) in covered]

    def vm(self, uuid: str, scope: Scope = EVERYWHERE) -> Vm:
        """NotFound, also when it is out of scope."""
        return self._core.vm_in(scope, uuid)

    def volume_path(self, disk: Disk) -> str:
        """The disk's volume, absolute; "" when it is in no pool (any more)."""
        try:
            return volume_path(pool_of(self._core.inventory.places, disk), disk.volume_name)
        except (NotFound, Invalid):
            return ""

    def create_vm(
        self,
        scope: Scope,
        name: str,
        zone_uuid: str,
        object_group: str,
        disks: Sequence[NewDisk],
    ) -> str:
        """The VM's uuid. See engine.inventory.vms.create_vm."""
        return vms.create_vm(self._core, scope, name, zone_uuid, object_group, disks)

    def delete_vm(self, uuid: str, delete_volumes: bool, scope: Scope = EVERYWHERE) -> None:
        """See engine.inventory.vms.delete_vm."""
        vms.delete_vm(self._core, scope, uuid, delete_volumes)

    # Backups --------------------------------------------------------------------------------

    def backups(self, query: BackupQuery) -> BackupPage:
        """A page of the catalogue. NotFound for an unknown member of the scope."""
        return self._core.catalogue.query(
            ranges(self._core.inventory.places, query.scope),
            _normal_query(query),
        )

    def backup(self, scope: Scope, uuid: str) -> Backup:
        """NotFound, also when it is out of scope."""
        return self._core.backup_in(scope, uuid)

    def create_backup(
        self,
        scope: Scope,
        vm_uuid: str,
        point_uuid: str,
        name: str,
        description: str,
        full: bool,
    ) -> tuple[str, str]:
        """(backup, job). See engine.backup.backup_job.create_backup."""
        return backup_job.create_backup(
            self._core, scope, vm_uuid, point_uuid, name, description, full
        )

    def delete_backup(self, scope: Scope, backup_uuid: str) -> None:
        """Slow when it frees much. See engine.backup.deletion.delete_backup."""
        deletion.delete_backup(self._core, scope, backup_uuid)

    def restore_backup(
        self,
        scope: Scope,
        backup_uuid: str,
        new_vm_name: str,
        disks: Sequence[RestoreTarget],
        object_group: str,
        zone_uuid: str,
        *,
        allow_damaged: bool = False,
    ) -> tuple[str, str]:
        """(VM, job). See engine.restore.restore_job.restore_backup."""
        return restore_job.restore_backup(
            self._core,
            scope,
            backup_uuid,
            new_vm_name,
            disks,
            object_group,
            zone_uuid,
            allow_damaged=allow_damaged,
        )

    def remote_backups(self, cluster_uuid: str, point_uuid: str) -> RemoteListing:
        """Slow. See engine.points.remote.remote_backups."""
        return remote.remote_backups(self._core, cluster_uuid, point_uuid)

    def import_backups(
        self, cluster_uuid: str, wanted: Sequence[tuple[str, str]]
    ) -> list[RemoteBackup]:
        """Slow. See engine.points.remote.import_backups."""
        return remote.import_backups(self._core, cluster_uuid, wanted)

    # Hosts and tracking ---------------------------------------------------------------------

    def hypervisors(self) -> list[HypervisorState]:
        """The hosts that VMs are known from, and which of them are away."""
        return self._core.inventory.hypervisors()

    def tracking(self) -> list[TrackingState]:
        """Of all disks that were ever cloned for a backup, and are still some VM's."""
        return [
            TrackingState(
                row.vm_uuid,
                row.target_device,
                row.volume,
                row.off,
                row.why,
                self._core.pinned.bytes_of(row),
            )
            for row in self._core.baselines.rows()
        ]

    def turn_tracking_on(self, vm_uuid: str, scope: Scope = EVERYWHERE) -> None:
        """Of all disks of a VM: the operator knows why it was ended. NotFound."""
        vm = self.vm(vm_uuid, scope)
        for disk in vm.disks:
            self._core.baselines.turn_on(vm.uuid, disk.target_device)

    def stuns(self) -> StunState:
        """How long VMs stood still for their snapshots."""
        return self._core.stuns.state

    # Points ---------------------------------------------------------------------------------

    def points(self) -> list[PointState]:
        """All attached ones, as last seen."""
        return self._core.points.states()

    def point(self, uuid: str) -> PointState:
        """NotFound."""
        return self._core.points.state(normal(uuid))

    def create_point(self, name: str, kind: str, path: str) -> str:
        """The point's uuid. Slow. See engine.points.points.Points.attach."""
        self._core.jobs.refuse_if_stopping()
        return self._core.points.attach(name, kind, path).uuid

    def delete_point(self, uuid: str, erase: bool) -> None:
        """Detaches; `erase` deletes our own domains' backups first (slow).

        NotFound, Conflict(point_in_use) while a job works on it; with `erase`, StorageErrors, and
        then it stays attached.
        """
        uuid = normal(uuid)
        self._core.points.state(uuid)
        self._require_unused(uuid)
        if erase:
            self._core.points.erase(uuid)
            self._require_unused(uuid)  # erasing takes its time
        self._core.points.detach(uuid)
        tend_baselines(self._core)

    def _require_unused(self, point_uuid: str) -> None:
        if self._core.jobs.active_on(point_uuid):
            raise Conflict("point_in_use", f"a job works on backup point {point_uuid}")

    def start_maintenance(self, kind: Maintenance, point_uuid: str, deep: bool) -> str:
        """The job's uuid. See engine.points.upkeep."""
        return upkeep.start_maintenance(self._core, kind, point_uuid, deep)

    # Jobs and the operation log -------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """Newest first."""
        return self._core.jobs.jobs()

    def job(self, uuid: str) -> Job:
        """NotFound."""
        return self._core.jobs.job(normal(uuid))

    def cancel_job(self, uuid: str) -> None:
        """NotFound, Conflict(job_finished)."""
        self._core.jobs.cancel(normal(uuid))

    def wait_for_job(self, uuid: str, timeout_s: float) -> Job:
        """The job once it has ended, or as it is after `timeout_s`. NotFound."""
        return self._core.jobs.wait(normal(uuid), timeout_s)

    def subscribe_jobs(self, callback: Callable[[Job], None]) -> Callable[[], None]:
        """See engine.jobs.jobs.Jobs.subscribe: called from engine threads, has to be quick."""
        return self._core.jobs.subscribe(callback)

    def log_operation(
        self, who: str, what: str, target: str, name: str, vm_type: str, scode: int, desc: str
    ) -> None:
        """Durable on return."""
        self._operations.add(who, what, target, name, vm_type, scode, desc)

    def operations(self, page: int, page_size: int) -> tuple[list[Operation], int]:
        """(the page, newest first; how many there are in all). `page` counts from 1."""
        return self._operations.page(page, page_size)


def _assemble(host: Host, state: State, config: Config) -> Core:
    probes = Probes()
    places = settle_places(state, config, host.path, host.default_pool_path, probes)
    if not config.pools and config.inventory == "embedded":
        host.make_default_pool()
    catalogue = Catalogue(state)
    points = [row.uuid for row in state.points.values()]
    catalogue.keep_only((cluster.uuid for cluster in places.clusters), points)
    around = Surroundings(host, places, catalogue, config.limits, state.distrusts)
    inventory = _inventory(state, places, config, host)
    hangs = Hangs(state.points, inventory, host.state_path, config.limits.stalled_after_s)
    return Core(
        config=config,
        state=state,
        inventory=inventory,
        catalogue=catalogue,
        jobs=Jobs(state, max_running=config.limits.max_jobs, hang_of=hangs.of),
        points=Points(state, around, probes),
        baselines=Baselines(state, time.time, reserve_share=config.tracking.pool_reserve_share),
        probes=probes,
    )


def _inventory(state: State, places: Places, config: Config, host: Host) -> Inventory:
    if config.inventory == "embedded":
        return EmbeddedInventory(state, places)
    from engine.libvirt.inventory import LibvirtInventory  # an optional extra

    return LibvirtInventory(state, places, config, host.id)


def _rooms(probes: Probes, pools: Sequence[Pool]) -> dict[str, tuple[int, int] | Exception]:
    """pool_room, or why it is not known, by the pool's uuid. All are asked at once."""
    keys = {f"pool {pool.uuid}": pool.uuid for pool in pools}
    asked = {f"pool {pool.uuid}": partial(pool_room, pool) for pool in pools}
    return {keys[key]: room for key, room in probes.ask_each(asked, POOL_LOOK_TIMEOUT_S).items()}


def _seen(pool: Pool, room: tuple[int, int] | Exception) -> PoolState:
    if isinstance(room, EngineError | TimeoutError):
        return PoolState(pool, error=str(room))
    if isinstance(room, Exception):
        raise room
    return PoolState(pool, *room)


def _sizes(probes: Probes, pools: Sequence[Pool]) -> SizeOf:
    """Of volumes, at a start: pools that do not answer are waited for once, not for each volume."""
    rooms = _rooms(probes, pools)
    silent = {uuid for uuid, room in rooms.items() if isinstance(room, EngineError | TimeoutError)}

    def size_of(pool: Pool, volume_name: str, volume_format: str) -> int | None:
        if pool.uuid in silent:
            raise PoolUnreachable(f"pool {pool.name} does not answer")
        return bounded_volume_size(probes, pool, volume_name, POOL_LOOK_TIMEOUT_S, volume_format)

    return size_of


def _normal_query(query: BackupQuery) -> BackupQuery:
    return replace(query, vm_uuid=normal(query.vm_uuid), point_uuid=normal(query.point_uuid))
