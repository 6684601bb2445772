"""Watching jobs to their end, with live bars for people."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from api.cli import units
from api.cli.client_command import Here
from api.cli.exits import FAILED, Failure
from api.client import Client
from api.printable import one_line
from api.schemas_companion import JobQuery, JobRow

LOOK_EVERY_S = 0.2
ENDED = frozenset({"succeeded", "failed", "cancelled"})


def follow(here: Here, job_uuids: Sequence[str]) -> list[JobRow]:
    """Returns when all of them have ended. Shows bars on stderr, unless asked for JSON."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[state]}", markup=False),
        console=here.screen.bars,
        disable=here.screen.json or not here.screen.bars.is_terminal,
        transient=True,
    )
    with bars:
        tasks = {uuid: bars.add_task(uuid[:8], state="", total=None) for uuid in job_uuids}
        while True:
            jobs = [_look(here.client, uuid) for uuid in job_uuids]
            for job in jobs:
                _draw(bars, tasks[job.job_uuid], job)
            if all(job.state in ENDED for job in jobs):
                return jobs
            time.sleep(LOOK_EVERY_S)


def finish(here: Here, job_uuid: str, **made: str) -> None:
    """Follows one job and tells its end; ends the command with FAILED if it did not succeed.

    As JSON it is one document: `{<made>, "job": {...}}`.
    """
    job = follow(here, [job_uuid])[0]
    if here.screen.json:
        here.screen.document(msgspec.json.encode({**made, "job": job}))
    for line in (f"{job.state}: {summary(job)}", *job.result):
        here.screen.line(line)
    require_success([job])


def require_success(jobs: Sequence[JobRow]) -> None:
    """Ends the command with FAILED unless all of them did what they were to do."""
    bad = [job for job in jobs if job.state != "succeeded"]
    if bad:
        raise Failure(FAILED, "; ".join(f"{job.kind} {job.state}: {job.error}" for job in bad))


def done_bytes(job: JobRow) -> int:
    """How much of its total a job has behind it."""
    progress = job.progress
    return max(progress.bytes_scanned, progress.bytes_restored)


def summary(job: JobRow) -> str:
    """One line on a job, in the numbers that its kind has."""
    progress = job.progress
    facts = [f"{units.size(done_bytes(job))} of {units.size(progress.bytes_total)}"]
    if job.kind == "backup":
        facts.append(f"read {units.size(progress.bytes_read)}")
        facts.append(f"changed {units.size(progress.bytes_changed)}")
        facts.append(f"stored {units.size(progress.bytes_stored)}")
    if progress.rate > 0:
        facts.append(f"{units.size(progress.rate)}/s")
    if job.finished_at > 0 and job.started_at > 0:
        facts.append(f"took {units.duration(job.finished_at - job.started_at)}")
    return ", ".join(facts)


def stall(job: JobRow) -> str:
    """What a job hangs on, and for how long; "" while it moves."""
    if not job.stalled_on:
        return ""
    return f"stalled {units.duration(job.stalled_s)}: {job.stalled_on} does not answer"


def pace(job: JobRow) -> str:
    """What a bar says of a running job, short enough for 80 columns."""
    if job.stalled_on:
        return one_line(stall(job))
    progress = job.progress
    facts = [f"{units.size(done_bytes(job))} of {units.size(progress.bytes_total)}"]
    if progress.rate > 0:
        facts.append(f"{units.size(progress.rate)}/s")
    if progress.eta_s >= 0:
        facts.append(f"{units.duration(progress.eta_s)} left")
    return "  ".join(facts)


def _look(client: Client, uuid: str) -> JobRow:
    return client.get("job/inspect", JobRow, JobQuery(job_uuid=uuid)).data


def _draw(bars: Progress, task: TaskID, job: JobRow) -> None:
    total = job.progress.bytes_total or (1 if job.state in ENDED else None)
    done = total if job.state == "succeeded" else done_bytes(job)
    text = pace(job) if job.state == "running" else job.state
    bars.update(task, description=job.kind, total=total, completed=done, state=text)
