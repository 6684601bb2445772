"""What there is to back up: clusters, tenants, namespaces, zones, groups, pools and their VMs.

`Inventory` is the seam. `EmbeddedInventory` keeps VMs in the state; engine/libvirt/inventory.py
mirrors libvirt's there. Everything but the VMs, and libvirt's pools, is fixed while the engine runs
(engine/inventory/seed.py settles it at the start), so it is plain tuples here; the VMs are rows of
the state.

A VM has one action at a time. `begin_action` is a compare-and-set inside one write transaction, and
so is the check that no name and no volume is given away twice: LMDB has one writer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from msgspec.structs import replace

from engine.errors import Conflict, NotFound, Thing
from engine.ids import normal
from engine.model import (
    BackupLabel,
    Cluster,
    Disk,
    Namespace,
    ObjectGroup,
    Pool,
    Tenant,
    Vm,
    VmAction,
    Zone,
)
from engine.snapshot.hold import Hold, HoldWish, Resting
from engine.state import State
from engine.verb_types import HypervisorState
from storage.lmdb_env.kv import WriteTxn

DEFAULT_NAME = "default"


@dataclass(frozen=True, slots=True)
class Places:
    """Everything that VMs stand in. Only `pools` may be empty; the first is the default."""

    clusters: tuple[Cluster, ...]
    tenants: tuple[Tenant, ...]
    namespaces: tuple[Namespace, ...]
    zones: tuple[Zone, ...]
    object_groups: tuple[ObjectGroup, ...]
    pools: tuple[Pool, ...]


class Inventory(Protocol):
    """Thread-safe. Rows are as of the call. `makes_vms`: whether VMs are made and deleted here."""

    makes_vms: bool

    def start(self) -> None: ...
    def stop(self) -> None: ...
    @property
    def places(self) -> Places: ...
    def vms(self) -> list[Vm]: ...
    def vm(self, uuid: str) -> Vm:
        """NotFound."""
        ...

    def left_out(self) -> list[Vm]:
        """Those of hosts that are not configured just now: no VMs, but remembered."""
        ...

    def hypervisors(self) -> list[HypervisorState]:
        """The hosts that VMs are known from; none where the VMs are our own."""
        ...

    def host_of(self, vm: Vm) -> str:
        """The hypervisor that has the VM, or will have it; "" for none."""
        ...

    def look_at(self, uuid: str) -> Vm:
        """The VM as it is now where it runs. NotFound, HypervisorAway."""
        ...

    def add_vm(self, vm: Vm) -> None:
        """Durable. Conflict(name_taken), at least in its namespace, Conflict(volume_in_use), and
        Invalid for a name that it can't have."""
        ...

    def remove_vm(self, uuid: str) -> Vm:
        """Durable; the row as it was. NotFound, Conflict (vm_busy, managed_by_libvirt)."""
        ...

    def hold_for(self, vm: Vm, wish: HoldWish) -> Hold | None:
        """How to hold the VM's disks for a backup; None: as engine/snapshot/snapshot.py does."""
        ...

    def resting(self, vm: Vm, wish: HoldWish) -> Resting:
        """More of a VM that `hold_for` has no way for. NotFound, HypervisorAway."""
        ...

    def realize(self, vm: Vm, label: BackupLabel) -> bool:
        """Makes the machine of a VM whose volumes are restored, if its label has one. Whether a
        hypervisor has it now: then it has the volumes too, whatever becomes of our note of that.

        HypervisorRefused; then there is no machine. HypervisorAway; then there may be one after
        all, which has no volumes, as they go.
        """
        ...

    def begin_action(self, uuid: str, action: VmAction) -> Vm:
        """The VM, now in `action`. NotFound, HypervisorAway, Conflict(vm_busy) if it was in one."""
        ...

    def note(self, uuid: str, change: Callable[[Vm], Vm]) -> None:
        """Applies `change`, durably; the VM stays in its action. One that is gone is no error."""
        ...

    def end_action(self, uuid: str, change: Callable[[Vm], Vm] = ...) -> None:
        """Clears the action and applies `change`. A VM that is gone is no error."""
        ...

    def end_action_in(self, txn: WriteTxn, uuid: str, change: Callable[[Vm], Vm] = ...) -> None:
        """The same, with what else the transaction changes."""
        ...

    def end_all_actions(self, change: Callable[[Vm], Vm]) -> list[Vm]:
        """After a restart: clears every action, applying `change`; the VMs as they were."""
        ...


def _unchanged(vm: Vm) -> Vm:
    return vm


class EmbeddedInventory:
    """VMs in the state environment. The VMs of `places`' clusters only are kept there."""

    makes_vms = True

    def __init__(self, state: State, places: Places) -> None:
        self._state = state
        self._places = places

    def start(self) -> None:
        """Nothing is needed."""

    def stop(self) -> None:
        """Nothing is left."""

    @property
    def places(self) -> Places:
        return self._places

    def hypervisors(self) -> list[HypervisorState]:
        return []

    def vms(self) -> list[Vm]:
        rows = filter(self._is_listed, self._state.vms.values())
        return sorted(rows, key=lambda vm: (vm.name, vm.uuid))

    def vm(self, uuid: str) -> Vm:
        found = self._state.vms.get(uuid)
        if found is None or not self._is_listed(found):
            raise NotFound("vm", uuid)
        return found

    def left_out(self) -> list[Vm]:
        return [vm for vm in self._state.vms.values() if not self._is_listed(vm)]

    def _is_listed(self, vm: Vm) -> bool:  # noqa: ARG002
        return True

    def host_of(self, vm: Vm) -> str:  # noqa: ARG002
        return ""

    def look_at(self, uuid: str) -> Vm:
        return self.vm(uuid)

    def hold_for(self, vm: Vm, wish: HoldWish) -> Hold | None:
        """Nobody else has the volumes that are ours to clone or to read."""

    def resting(self, vm: Vm, wish: HoldWish) -> Resting:  # noqa: ARG002
        return Resting()

    def realize(self, vm: Vm, label: BackupLabel) -> bool:  # noqa: ARG002
        """A VM is its record here."""
        return False

    def add_vm(self, vm: Vm) -> None:
        with self._state.store.write() as txn:
            require_addable(vm, [*filter(self._is_listed, self._state.vms.values_in(txn))])
            self._state.vms.put_in(txn, vm)

    def remove_vm(self, uuid: str) -> Vm:
        with self._state.store.write() as txn:
            vm = self._state.vms.get_in(txn, uuid)
            if vm is None:
                raise NotFound("vm", uuid)
            require_idle(vm)
            self._state.vms.delete_in(txn, uuid)
        return vm

    def begin_action(self, uuid: str, action: VmAction) -> Vm:
        with self._state.store.write() as txn:
            vm = self._state.vms.get_in(txn, uuid)
            if vm is None:
                raise NotFound("vm", uuid)
            require_idle(vm)
            vm = replace(vm, action=action)
            self._state.vms.put_in(txn, vm)
        return vm

    def note(self, uuid: str, change: Callable[[Vm], Vm]) -> None:
        with self._state.store.write() as txn:
            self._note_in(txn, uuid, change)

    def end_action(self, uuid: str, change: Callable[[Vm], Vm] = _unchanged) -> None:
        self.note(uuid, lambda vm: replace(change(vm), action=""))

    def end_action_in(
        self, txn: WriteTxn, uuid: str, change: Callable[[Vm], Vm] = _unchanged
    ) -> None:
        self._note_in(txn, uuid, lambda vm: replace(change(vm), action=""))

    def _note_in(self, txn: WriteTxn, uuid: str, change: Callable[[Vm], Vm]) -> None:
        before = self._state.vms.get_in(txn, uuid)
        if before is not None and (vm := change(before)) != before:
            self._state.vms.put_in(txn, vm)

    def end_all_actions(self, change: Callable[[Vm], Vm]) -> list[Vm]:
        with self._state.store.write() as txn:
            busy = [vm for vm in self._state.vms.values_in(txn) if vm.action]
            for vm in busy:
                self._state.vms.put_in(txn, replace(change(vm), action=""))
        return busy


def require_idle(vm: Vm) -> None:
    """Raises Conflict(vm_busy) if the VM is in an action."""
    if vm.action:
        raise Conflict("vm_busy", f"VM {vm.name} ({vm.uuid}) is {vm.action}")


def require_addable(vm: Vm, others: Sequence[Vm]) -> None:
    """Raises Conflict if the VM's name, or a volume of its, belongs to another VM."""
    mine = {(disk.pool_uuid, disk.volume_name): disk for disk in vm.disks}
    for other in others:
        owner = f"VM {other.name} ({other.uuid})"
        if (other.cluster_uuid, other.namespace, other.name) == (
            vm.cluster_uuid,
            vm.namespace,
            vm.name,
        ):
            raise Conflict("name_taken", f"{owner} is in that namespace")
        for disk in other.disks:
            rival = mine.get((disk.pool_uuid, disk.volume_name))
            if rival is not None and not (rival.share and disk.share):
                raise Conflict("volume_in_use", f"volume {disk.volume_name!r} belongs to {owner}")


class Named(Protocol):
    """What is told from others of its kind by a uuid, and by people by a name."""

    @property
    def uuid(self) -> str: ...
    @property
    def name(self) -> str: ...


PlaceT = TypeVar("PlaceT", bound=Named)


def find(what: Thing, rows: Sequence[PlaceT], uuid: str) -> PlaceT:
    """The row with this uuid. NotFound."""
    for row in rows:
        if row.uuid == uuid:
            return row
    raise NotFound(what, uuid)


def called(rows: Sequence[PlaceT], wanted: str) -> PlaceT | None:
    """The row of that name, or of that uuid."""
    return next((row for row in rows if wanted == row.name or normal(wanted) == row.uuid), None)


def find_or_default(what: Thing, rows: Sequence[PlaceT], uuid: str) -> PlaceT:
    """The row with this uuid, for "" the default one. NotFound."""
    return find(what, rows, uuid) if uuid else default_of(rows)


def default_of(rows: Sequence[PlaceT]) -> PlaceT:
    """The one named `default`, else the first."""
    return next((row for row in rows if row.name == DEFAULT_NAME), rows[0])


def pool_of(places: Places, disk: Disk) -> Pool:
    """The pool that the disk's volume lives in. NotFound."""
    return find("pool", places.pools, disk.pool_uuid)
