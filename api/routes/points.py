"""/v1/backup_point/…: points that this host is attached to, and their maintenance."""

from __future__ import annotations

from api.calls import AnyCall, Call, Reply
from api.schemas import Empty, NoArguments, RowList
from api.schemas_companion import (
    JobStarted,
    PointCreate,
    PointCreated,
    PointDelete,
    PointInspectQuery,
    PointMaintenance,
    PointRow,
)
from engine.service import Engine
from engine.verb_types import Maintenance, PointState


def _list(engine: Engine, _query: NoArguments) -> Reply[RowList[PointRow]]:
    rows = [_row(state) for state in engine.points()]
    return Reply(RowList(rows=rows, total_count=len(rows)))


def _inspect(engine: Engine, query: PointInspectQuery) -> Reply[PointRow]:
    return Reply(_row(engine.point(query.backup_point_uuid)))


def _create(engine: Engine, body: PointCreate) -> Reply[PointCreated]:
    point_uuid = engine.create_point(body.name, body.kind, body.path)
    return Reply(PointCreated(backup_point_uuid=point_uuid))


def _delete(engine: Engine, body: PointDelete) -> Reply[Empty]:
    engine.delete_point(body.backup_point_uuid, body.erase)
    return Reply(Empty())


def _row(state: PointState) -> PointRow:
    point = state.point
    return PointRow(
        backup_point_uuid=point.uuid,
        name=point.name,
        kind=point.kind,
        path=point.path,
        state=state.state,
        capacity=state.capacity,
        free=state.free,
        stored_bytes=state.stored_bytes,
        logical_bytes=state.logical_bytes,
        chunk_count=state.chunk_count,
        pack_count=state.pack_count,
        backup_count=state.backup_count,
        last_error=state.last_error,
    )


def _maintenance(kind: Maintenance, summary: str) -> Call[PointMaintenance, JobStarted]:
    def start(engine: Engine, body: PointMaintenance) -> Reply[JobStarted]:
        job_uuid = engine.start_maintenance(kind, body.backup_point_uuid, body.deep)
        return Reply(JobStarted(job_uuid=job_uuid))

    return Call(
        method="POST",
        path=f"/v1/backup_point/{kind}",
        summary=summary,
        tag="backup point",
        request=PointMaintenance,
        answer=JobStarted,
        run=start,
        pace="slow",
        target="backup_point_uuid",
    )


CALLS: tuple[AnyCall, ...] = (
    Call(
        method="GET",
        path="/v1/backup_point/list",
        summary="Attached backup points.",
        tag="backup point",
        request=NoArguments,
        answer=RowList[PointRow],
        run=_list,
    ),
    Call(
        method="GET",
        path="/v1/backup_point/inspect",
        summary="One backup point.",
        tag="backup point",
        request=PointInspectQuery,
        answer=PointRow,
        run=_inspect,
    ),
    Call(
        method="POST",
        path="/v1/backup_point/create",
        summary="Make a point of an empty directory, or attach one that is a point.",
        tag="backup point",
        request=PointCreate,
        answer=PointCreated,
        run=_create,
        pace="slow",
        target="path",
        named="name",
    ),
    Call(
        method="POST",
        path="/v1/backup_point/delete",
        summary="Detach a point; with `erase`, erase this cluster's domain on it too.",
        tag="backup point",
        request=PointDelete,
        answer=Empty,
        run=_delete,
        pace="slow",
        target="backup_point_uuid",
    ),
    _maintenance("verify", "Check a point; `deep` reads every stored byte."),
    _maintenance("gc", "Free what no backup needs."),
    _maintenance("rebuild", "Make the view anew from the point's files."),
)
