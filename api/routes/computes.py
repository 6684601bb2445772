"""/v1/compute/…: VMs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from api.calls import AnyCall, Call, Reply, scope_of
from api.schemas import Empty, RowList
from api.schemas_companion import (
    ComputeCreate,
    ComputeCreated,
    ComputeDelete,
    ComputeDiskRow,
    ComputeInspectQuery,
    ComputeListQuery,
    ComputeRow,
    ComputeTrack,
    NewDiskMembers,
)
from engine.model import Vm
from engine.service import Engine
from engine.verb_types import NewDisk, TrackingState

Tracking: TypeAlias = Mapping[str, Sequence[TrackingState]]  # by VM


def _list(engine: Engine, query: ComputeListQuery) -> Reply[RowList[ComputeRow]]:
    tracking = _tracking(engine)
    rows = [_row(engine, vm, tracking.get(vm.uuid, [])) for vm in engine.vms(scope_of(query))]
    return Reply(RowList(rows=rows, total_count=len(rows)))


def _inspect(engine: Engine, query: ComputeInspectQuery) -> Reply[ComputeRow]:
    vm = engine.vm(query.compute_uuid, scope_of(query))
    return Reply(_row(engine, vm, _tracking(engine).get(vm.uuid, [])))


def _create(engine: Engine, body: ComputeCreate) -> Reply[ComputeCreated]:
    vm_uuid = engine.create_vm(
        scope_of(body),
        body.compute_name,
        body.zone_uuid,
        body.object_group,
        [_new_disk(disk) for disk in body.disks],
    )
    return Reply(ComputeCreated(compute_uuid=vm_uuid))


def _delete(engine: Engine, body: ComputeDelete) -> Reply[Empty]:
    engine.delete_vm(body.compute_uuid, body.delete_volumes, scope_of(body))
    return Reply(Empty())


def _new_disk(disk: NewDiskMembers) -> NewDisk:
    return NewDisk(
        target_device=disk.target_device,
        pool_uuid=disk.pool_uuid,
        volume_name=disk.volume_name,
        capacity=disk.capacity or None,
        usd_type=disk.usd_type,
        replica=disk.replica,
        share=disk.share,
    )


def _track(engine: Engine, body: ComputeTrack) -> Reply[Empty]:
    engine.turn_tracking_on(body.compute_uuid, scope_of(body))
    return Reply(Empty())


def _tracking(engine: Engine) -> Tracking:
    found: dict[str, list[TrackingState]] = {}
    for one in engine.tracking():
        found.setdefault(one.vm_uuid, []).append(one)
    return found


def _row(engine: Engine, vm: Vm, tracking: Sequence[TrackingState]) -> ComputeRow:
    pinned = {one.target_device: one.pinned_bytes for one in tracking}
    return ComputeRow(
        compute_uuid=vm.uuid,
        compute_name=vm.name,
        cluster_uuid=vm.cluster_uuid,
        tenant=vm.tenant,
        namespace=vm.namespace,
        zone_uuid=vm.zone_uuid,
        object_group=vm.object_group,
        vm_type=vm.vm_type,
        state=vm.state,
        action=vm.action,
        disks=[
            ComputeDiskRow(
                target_device=disk.target_device,
                pool_uuid=disk.pool_uuid,
                volume_name=disk.volume_name,
                path=engine.volume_path(disk),
                capacity=disk.capacity,
                usd_type=disk.usd_type,
                replica=disk.replica,
                share=disk.share,
                format=disk.format,
                pinned=pinned.get(disk.target_device, 0),
            )
            for disk in vm.disks
        ],
        alerts=[
            f"changes of {one.target_device} are not tracked any more: {one.off}"
            for one in tracking
            if one.off
        ],
        last_error=vm.last_error,
        host=vm.host,
    )


CALLS: tuple[AnyCall, ...] = (
    Call(
        method="GET",
        path="/v1/compute/list",
        summary="VMs.",
        tag="compute",
        request=ComputeListQuery,
        answer=RowList[ComputeRow],
        run=_list,
    ),
    Call(
        method="GET",
        path="/v1/compute/inspect",
        summary="One VM.",
        tag="compute",
        request=ComputeInspectQuery,
        answer=ComputeRow,
        run=_inspect,
    ),
    Call(
        method="POST",
        path="/v1/compute/create",
        summary="Make a VM; volumes that exist are taken over as they are.",
        tag="compute",
        request=ComputeCreate,
        answer=ComputeCreated,
        run=_create,
        pace="slow",
        target="compute_name",
        named="compute_name",
    ),
    Call(
        method="POST",
        path="/v1/compute/track",
        summary="Track the changes of a VM's disks again, after an alert was looked into.",
        tag="compute",
        request=ComputeTrack,
        answer=Empty,
        run=_track,
        target="compute_uuid",
    ),
    Call(
        method="POST",
        path="/v1/compute/delete",
        summary="Remove a VM; its backups stay.",
        tag="compute",
        request=ComputeDelete,
        answer=Empty,
        run=_delete,
        pace="slow",
        target="compute_uuid",
    ),
)
