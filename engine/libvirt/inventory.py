"""The domains of libvirt hosts as an Inventory.

The rows stay in the state, as those of the embedded inventory do, so that everything else works on
them alike; here they are a mirror: each look at a host puts in what is new, and takes out what is
gone. A VM's action and its last error are ours and stay. While a host is away its VMs are shown
as last seen, `unreachable`, with the reason. A VM that is being restored, or whose restore failed,
is no domain (yet): its row has no host, and no look touches it.

The VMs of a host that is not configured are left out, and their rows stay: a wrong URI costs
nothing once the right one is back. A domain that another host has now is that one's.

Pools come and go with the hosts: `places` is what it is at the call.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace as changed
from functools import partial

from msgspec.structs import replace

from engine.config import Config, LibvirtHost
from engine.errors import ConfigInvalid, Conflict, HypervisorAway, Invalid, NotFound
from engine.inventory.inventory import EmbeddedInventory, Places, find, pool_of
from engine.inventory.seed import refer
from engine.inventory.volumes import volume_path
from engine.libvirt.binding import NO_SUCH_DOMAIN, Domain, LibvirtFault, code_of, require_libvirt
from engine.libvirt.directories import Directories
from engine.libvirt.domains import read_domain
from engine.libvirt.ending import end_left_job
from engine.libvirt.live import begin_live
from engine.libvirt.resting import resting_domain
from engine.libvirt.restored import define_restored
from engine.libvirt.rows import directories_of, pools_of, vm_of
from engine.libvirt.scratch import clear_left
from engine.libvirt.setup import LiveSetup
from engine.libvirt.watch import DomainSeen, Sight, Watch, look_at
from engine.model import BackupLabel, Disk, Pool, Vm, VmAction
from engine.probes import Probes
from engine.snapshot.hold import Held, Hold, HoldWish, Resting
from engine.state import State
from engine.verb_types import HypervisorState
from storage.errors import StorageError
from storage.files.in_flight import InFlight

log = logging.getLogger(__name__)

FIRST_LOOK_S = 5.0
ANSWER_TIMEOUT_S = 5.0  # of libvirt, for a caller that has others behind it
SCRATCH_TIMEOUT_S = 2.0
AWAY_TIMEOUT_S = 90.0  # what was restored is not thrown away sooner
AWAY_PAUSE_S = 0.2


class LibvirtInventory(EmbeddedInventory):
    """See the module. Hosts are watched from `start` to `stop`."""

    makes_vms = False

    def __init__(self, state: State, places: Places, config: Config, host: str) -> None:
        """ConfigInvalid when no host, one twice, or an unknown cluster is configured."""
        require_libvirt()
        super().__init__(state, places)
        hosts = config.libvirt.hosts
        if not hosts:
            raise ConfigInvalid('inventory = "libvirt" needs at least one of [[libvirt.hosts]]')
        self._live = LiveSetup(
            host=host[:8],
            scratch=config.libvirt.scratch.rstrip("/"),
            reserve_bytes=config.libvirt.scratch_reserve_bytes,
            limit_bytes=config.libvirt.scratch_limit_bytes,
            freeze_timeout_s=config.freeze.timeout_s,
            freeze_hold_s=config.freeze.hold_s,
            tpm_directory=config.libvirt.tpm_directory,
        )
        self._rules = config.libvirt.rules
        self._clusters = _clusters_of(hosts, places)
        self._watches = {host.uri: Watch(host.uri, self._on_sight) for host in hosts}
        self._directories = Directories(state.directories)
        self._probes = Probes()
        self._lock = threading.Lock()
        self._pools: dict[str, dict[str, Pool]] = {}  # by host, then by directory
        self._cleared: set[str] = set()  # hosts without jobs of a former process

    def start(self) -> None:
        """Returns when every host was looked at once, or is taking too long for that."""
        with contextlib.suppress(TimeoutError):
            self._probes.ask("scratch", partial(clear_left, self._live.ours), SCRATCH_TIMEOUT_S)
        end = time.monotonic() + FIRST_LOOK_S
        for watch in self._watches.values():
            watch.start()
        for watch in self._watches.values():
            watch.first_look(max(end - time.monotonic(), 0.0))

    def stop(self) -> None:
        for watch in self._watches.values():
            watch.stop()

    @property
    def places(self) -> Places:
        with self._lock:
            found = {pool.uuid: pool for pool in super().places.pools}
            for pools in self._pools.values():
                for pool in pools.values():
                    found.setdefault(pool.uuid, pool)
        return changed(super().places, pools=tuple(found.values()))

    def hypervisors(self) -> list[HypervisorState]:
        return [HypervisorState(name, watch.problem) for name, watch in self._watches.items()]

    def vms(self) -> list[Vm]:
        return [self._as_reachable(vm) for vm in super().vms()]

    def vm(self, uuid: str) -> Vm:
        return self._as_reachable(super().vm(uuid))

    def look_at(self, uuid: str) -> Vm:
        vm = super().vm(uuid)
        if not vm.host:
            return vm
        domain = self.domain(vm)
        with libvirt_errors(vm):
            seen = look_at(domain)
        if seen is not None:
            self._put([self._row(vm.host, seen)])
        return super().vm(uuid)

    def hold_for(self, vm: Vm, wish: HoldWish) -> Hold | None:
        if vm.state not in ("running", "paused"):
            return None

        def hold(parent: str) -> Held:
            with InFlight(vm.host):
                return begin_live(partial(self.domain, vm), vm, self._live, wish, parent)

        return hold

    def resting(self, vm: Vm, wish: HoldWish) -> Resting:
        if not vm.host:
            return Resting()
        domain = self.domain(vm)
        with libvirt_errors(vm):
            facts = read_domain(domain.XMLDesc())
        return resting_domain(domain, facts, self._live, wish)

    def host_of(self, vm: Vm) -> str:
        return vm.host or (self._host_of(vm).name if vm.disks else "")

    def add_vm(self, vm: Vm) -> None:
        """Also Conflict(name_taken) for the name of any domain of the host that it is to be on, as
        far as that answers, and Invalid for one that no domain can have: before its volumes are
        made, which may take hours."""
        if "/" in vm.name or "\n" in vm.name:
            raise Invalid("new_vm_name", f"{vm.name!r}: libvirt takes no slash and no line's end")
        watch = self._host_of(vm)
        named = partial(watch.has_named, vm.name)
        with contextlib.suppress(HypervisorAway, LibvirtFault, TimeoutError):
            if self._probes.ask(f"{vm.name} on {watch.name}", named, ANSWER_TIMEOUT_S):
                raise Conflict("name_taken", f"a domain named {vm.name!r} is on {watch.name}")
        super().add_vm(vm)

    def realize(self, vm: Vm, label: BackupLabel) -> bool:
        if label.machine is None:
            log.warning("no_domain_in_backup", extra={"vm": vm.uuid})
            return False
        watch = self._host_of(vm)
        paths = {
            disk.target_device: volume_path(pool_of(self.places, disk), disk.volume_name)
            for disk in vm.disks
        }
        define = partial(
            define_restored,
            vm=vm,
            machine=label.machine,
            paths=paths,
            marks=self._marks(vm),
            tpm_directory=self._live.tpm_directory,
        )
        with InFlight(watch.name):
            made = _patiently(lambda: define(watch.connection()))
            # It is defined, and has its volumes: the next look sees it.
            with contextlib.suppress(LibvirtFault, StorageError):
                self._put([self._row(watch.name, seen) for seen in [look_at(made)] if seen])
        return True

    def _is_listed(self, vm: Vm) -> bool:
        return not vm.host or vm.host in self._watches

    def _host_of(self, vm: Vm) -> Watch:
        """Where its first volume's pool is; of several that have it, the first in sight."""
        wanted = vm.disks[0].pool_uuid
        with self._lock:
            names = [
                name
                for name, pools in self._pools.items()
                if any(pool.uuid == wanted for pool in pools.values())
            ]
        found = [self._watches[name] for name in names or self._watches]
        return next((watch for watch in found if not watch.problem), found[0])

    def _marks(self, vm: Vm) -> dict[str, str]:
        places = super().places
        return {
            "namespace": find("namespace", places.namespaces, vm.namespace).name,
            "zone": find("zone", places.zones, vm.zone_uuid).name,
            "object_group": find("object_group", places.object_groups, vm.object_group).name,
            "vm_type": vm.vm_type,
        }

    def begin_action(self, uuid: str, action: VmAction) -> Vm:
        vm = super().vm(uuid)
        problem = self._watch(vm.host).problem if vm.host else ""
        if problem:
            raise HypervisorAway(f"{vm.host}: {problem}")
        try:
            self._probes.ask(f"VM {uuid}", partial(self.look_at, uuid), ANSWER_TIMEOUT_S)
        except TimeoutError as error:
            raise HypervisorAway(f"{vm.host}: {error}") from None
        return super().begin_action(uuid, action)

    def remove_vm(self, uuid: str) -> Vm:
        vm = super().vm(uuid)
        if vm.host:
            raise Conflict("managed_by_libvirt", f"VM {vm.name} is a domain of {vm.host}")
        return super().remove_vm(uuid)

    def domain(self, vm: Vm) -> Domain:
        """The VM's domain. HypervisorAway, NotFound."""
        with libvirt_errors(vm):
            return self._watch(vm.host).domain(vm.uuid)

    def _watch(self, host: str) -> Watch:
        watch = self._watches.get(host)
        if watch is None:
            raise HypervisorAway(f"{host} is not configured any more")
        return watch

    def _as_reachable(self, vm: Vm) -> Vm:
        watch = self._watches.get(vm.host)
        problem = watch.problem if watch else ""
        if not problem:
            return vm
        return replace(vm, state="unreachable", last_error=f"{vm.host}: {problem}")

    # The mirror ---------------------------------------------------------------------------------

    def _on_sight(self, watch: Watch, sight: Sight) -> None:
        directories = self._directories.seen(watch.name, directories_of(sight))
        with self._lock:
            self._pools[watch.name] = pools_of(watch.name, sight, directories)
        rows = {seen.facts.uuid: self._row(watch.name, seen) for seen in sight.domains}
        self._put(list(rows.values()))
        self._remove_but(watch, rows)
        if watch.name not in self._cleared:
            self._end_left_jobs(watch, sight)

    def _end_left_jobs(self, watch: Watch, sight: Sight) -> None:
        """Those of a former process; none of this one can be on before the host is in sight."""
        for seen in sight.domains:
            if seen.state != "stopped":
                with contextlib.suppress(LibvirtFault):  # then its next backup does it
                    end_left_job(partial(watch.domain, seen.facts.uuid), self._live.ours)
        if watch.connection().isAlive():
            self._cleared.add(watch.name)

    def _row(self, host: str, seen: DomainSeen) -> Vm | None:
        with self._lock:
            pools = dict(self._pools.get(host, {}))
        return vm_of(host, self._clusters[host], seen, super().places, pools, self._rules)

    def _put(self, rows: Sequence[Vm | None]) -> None:
        with self._state.store.write() as txn:
            for row in rows:
                if row is None:
                    continue
                before = self._state.vms.get_in(txn, row.uuid)
                if before is not None:
                    if self._is_anothers(before, row):
                        continue
                    row = _merged(before, row)
                if row != before:
                    self._state.vms.put_in(txn, row)

    def _is_anothers(self, before: Vm, row: Vm) -> bool:
        """A domain on two hosts, as in a migration: it is where it runs, else where it was."""
        if before.host in ("", row.host):
            return False
        known = self._watches.get(before.host)
        return known is not None and not known.problem and row.state == "stopped"

    def _remove_but(self, watch: Watch, seen: Mapping[str, Vm | None]) -> None:
        """Takes out the host's VMs that are gone, or left out now, unless they are in an action.

        Not to be seen is not to be gone: a domain can have been defined since the look began.
        """
        unseen = [
            vm.uuid for vm in super().vms() if vm.host == watch.name and seen.get(vm.uuid) is None
        ]
        gone = [uuid for uuid in unseen if uuid in seen or not watch.has(uuid)]
        with self._state.store.write() as txn:
            for uuid in gone:
                row = self._state.vms.get_in(txn, uuid)
                if row is not None and not row.action:
                    self._state.vms.delete_in(txn, uuid)


def _patiently(ask: Callable[[], Domain]) -> Domain:
    """Asks again as long as libvirt is away, up to a limit. Raises what `ask` does."""
    deadline_s = time.monotonic() + AWAY_TIMEOUT_S
    while True:
        try:
            return ask()
        except HypervisorAway:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(AWAY_PAUSE_S)


@contextlib.contextmanager
def libvirt_errors(vm: Vm) -> Iterator[None]:
    """Turns a LibvirtFault into NotFound for a domain that is gone, else into HypervisorAway."""
    try:
        with InFlight(vm.host):
            yield
    except LibvirtFault as error:
        if code_of(error) == NO_SUCH_DOMAIN:
            raise NotFound("vm", vm.uuid) from None
        raise HypervisorAway(f"{vm.host}: {error}") from error


def _clusters_of(hosts: Sequence[LibvirtHost], places: Places) -> dict[str, str]:
    clusters = {host.uri: refer(places.clusters, host.cluster, "cluster").uuid for host in hosts}
    if len(clusters) != len(hosts):
        raise ConfigInvalid("libvirt.hosts: a uri is listed twice")
    return clusters


def _merged(before: Vm, row: Vm) -> Vm:
    """What libvirt says now, with what is ours, and with the sizes that could not be asked for."""
    sizes = {(disk.target_device, disk.volume_name): disk.capacity for disk in before.disks}
    return replace(
        row,
        action=before.action,
        last_error=before.last_error,
        disks=tuple(_sized(disk, sizes) for disk in row.disks),
    )


def _sized(disk: Disk, sizes: dict[tuple[str, str], int]) -> Disk:
    known = sizes.get((disk.target_device, disk.volume_name), 0)
    return disk if disk.capacity else replace(disk, capacity=known)
