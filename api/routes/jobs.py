"""/v1/job/…, and /v1/operation/list: the work under way, and who asked for what."""

from __future__ import annotations

from api.calls import AnyCall, Call, Reply
from api.schemas import Empty, NoArguments, Paging, RowList, page_of
from api.schemas_companion import JobQuery, JobRow, OperationRow, ProgressMembers
from engine.model import Job, Operation
from engine.service import Engine


def job_row(job: Job) -> JobRow:
    """A job as it is shown, also in the events."""
    progress = job.progress
    return JobRow(
        job_uuid=job.uuid,
        kind=job.kind,
        backup_uuid=job.backup_uuid,
        compute_uuid=job.compute_uuid,
        backup_point_uuid=job.backup_point_uuid,
        state=job.state,
        error=job.error,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        progress=ProgressMembers(
            bytes_total=progress.bytes_total,
            bytes_scanned=progress.bytes_scanned,
            bytes_read=progress.bytes_read,
            bytes_changed=progress.bytes_changed,
            bytes_stored=progress.bytes_stored,
            bytes_restored=progress.bytes_restored,
            rate=progress.rate,
            eta_s=progress.eta_s,
        ),
        stalled_s=job.stalled_s,
        stalled_on=job.stalled_on,
        result=list(job.result),
    )


def _list(engine: Engine, _query: NoArguments) -> Reply[RowList[JobRow]]:
    rows = [job_row(job) for job in engine.jobs()]
    return Reply(RowList(rows=rows, total_count=len(rows)))


def _inspect(engine: Engine, query: JobQuery) -> Reply[JobRow]:
    return Reply(job_row(engine.job(query.job_uuid)))


def _cancel(engine: Engine, body: JobQuery) -> Reply[Empty]:
    engine.cancel_job(body.job_uuid)
    return Reply(Empty())


def _operations(engine: Engine, query: Paging) -> Reply[RowList[OperationRow]]:
    rows, total = engine.operations(*page_of(query.page_number, query.page_size))
    return Reply(RowList(rows=[_operation_row(row) for row in rows], total_count=total))


def _operation_row(row: Operation) -> OperationRow:
    return OperationRow(
        seq=row.seq,
        at=row.at,
        who=row.who,
        what=row.what,
        target=row.target,
        name=row.name,
        vm_type=row.vm_type,
        scode=row.scode,
        desc=row.desc,
    )


CALLS: tuple[AnyCall, ...] = (
    Call(
        method="GET",
        path="/v1/job/list",
        summary="Jobs, newest first; the last thousand finished ones are kept, the newest in full.",
        tag="job",
        request=NoArguments,
        answer=RowList[JobRow],
        run=_list,
    ),
    Call(
        method="GET",
        path="/v1/job/inspect",
        summary="One job.",
        tag="job",
        request=JobQuery,
        answer=JobRow,
        run=_inspect,
    ),
    Call(
        method="POST",
        path="/v1/job/cancel",
        summary="Ask a job to end.",
        tag="job",
        request=JobQuery,
        answer=Empty,
        run=_cancel,
        target="job_uuid",
    ),
    Call(
        method="GET",
        path="/v1/operation/list",
        summary="The operation log, newest first.",
        tag="job",
        request=Paging,
        answer=RowList[OperationRow],
        run=_operations,
    ),
)
