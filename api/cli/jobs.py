"""`vmkeep job` and `vmkeep operation`: what is being done, and what was."""

from __future__ import annotations

from collections.abc import Sequence

import click
import msgspec
from rich.table import Table

from api.cli import names, units
from api.cli.client_command import Here, client_command
from api.cli.follow import ENDED, follow, require_success, stall, summary
from api.cli.screen import card, table
from api.schemas import Empty, Paging, RowList
from api.schemas_companion import JobQuery, JobRow, OperationRow


@click.group()
def job() -> None:
    """Backups, restores and maintenance, while they run and after."""


@job.command("list")
@client_command
def list_jobs(here: Here) -> None:
    """Jobs, newest first."""
    here.screen.answer(here.client.get("job/list", RowList[JobRow]), _list_view)


@job.command("inspect")
@click.argument("job_uuid", metavar="JOB_UUID")
@client_command
def inspect(here: Here, *, job_uuid: str) -> None:
    """One job."""
    query = JobQuery(job_uuid=names.pick(here.client, "job", job_uuid, names.jobs))
    here.screen.answer(here.client.get("job/inspect", JobRow, query), _card)


@job.command("cancel")
@click.argument("job_uuid", metavar="JOB_UUID")
@client_command
def cancel(here: Here, *, job_uuid: str) -> None:
    """Ask a job to end. What it made so far is thrown away."""
    uuid = names.pick(here.client, "job", job_uuid, names.jobs)
    reply = here.client.post("job/cancel", Empty, JobQuery(job_uuid=uuid))
    here.screen.answer(reply, lambda _: f"asked {uuid} to end")


@job.command("watch")
@click.argument("job_uuids", metavar="[JOB_UUID]...", nargs=-1)
@client_command
def watch(here: Here, *, job_uuids: Sequence[str]) -> None:
    """Follow jobs to their end, with live progress: those named, or all that are under way.

    Exit code 1 when one of them did not succeed.
    """
    job_uuids = [names.pick(here.client, "job", job_uuid, names.jobs) for job_uuid in job_uuids]
    if not job_uuids:
        rows = here.client.get("job/list", RowList[JobRow]).data.rows
        job_uuids = [row.job_uuid for row in rows if row.state not in ENDED]
    jobs = follow(here, job_uuids)
    if here.screen.json:
        here.screen.document(msgspec.json.encode(jobs))
    for ended in jobs:
        here.screen.line(f"{ended.job_uuid} {ended.kind} {ended.state}: {summary(ended)}")
    require_success(jobs)


@click.group()
def operation() -> None:
    """The operation log."""


@operation.command("list")
@click.option("--page", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--page-size", type=click.IntRange(1, 1000), default=50, show_default=True)
@client_command
def list_operations(here: Here, *, page: int, page_size: int) -> None:
    """Who asked for what, newest first, and how it ended."""
    query = Paging(page_number=page, page_size=page_size)
    reply = here.client.get("operation/list", RowList[OperationRow], query)
    here.screen.answer(reply, _operations)


def _list_view(answer: RowList[JobRow]) -> Table:
    columns = ("started", "kind", "state", "progress", "job uuid")
    return table(columns, (_row(row) for row in answer.rows))


def _row(row: JobRow) -> tuple[str, ...]:
    progress = (stall(row) or summary(row)) if row.state != "queued" else ""
    return (units.time(row.started_at), row.kind, row.state, row.error or progress, row.job_uuid)


def _card(row: JobRow) -> Table:
    return card(
        [
            ("job", row.job_uuid),
            ("kind", row.kind),
            ("state", row.state),
            ("error", row.error),
            ("stalled", stall(row)),
            ("progress", summary(row)),
            ("backup", row.backup_uuid),
            ("VM", row.compute_uuid),
            ("point", row.backup_point_uuid),
            ("created", units.time(row.created_at)),
            ("started", units.time(row.started_at)),
            ("finished", units.time(row.finished_at)),
            *(("", line) for line in row.result),
        ]
    )


def _operations(answer: RowList[OperationRow]) -> Table:
    return table(
        ("when", "who", "what", "on", "outcome"),
        (
            (
                units.time(row.at),
                row.who,
                " ".join(filter(None, (row.what, row.vm_type))),
                row.name or row.target,
                row.desc or "ok" if not row.scode else f"{row.scode} {row.desc}",
            )
            for row in answer.rows
        ),
    )
