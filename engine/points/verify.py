"""Verifying a backup point as a job: storage's checker, with the job's progress and cancelling."""

from __future__ import annotations

from collections.abc import Callable

from engine.jobs.jobs import JobContext
from storage.check.check import Cancelled as CheckCancelled
from storage.check.check import CheckReport, Damage, DiskDamage, Finding, Reads, check_point

SHOWN_FINDINGS = 1000


def run_verify(
    point_path: str,
    deep: bool,
    ctx: JobContext,
    *,
    reads: Reads | None = None,
    on_damage: Callable[[Damage], None] = lambda _damage: None,
    rate_bytes_per_s: int = 0,
) -> CheckReport:
    """Checks all of a point; `deep` reads every chunk. Findings are in the report, not raised.

    Progress counts a deep check's bytes; a shallow one reads next to nothing and has none.
    Raises Cancelled, PointUnreachable, PointNewerFormat.
    """
    progress = _Progress(ctx)
    try:
        return check_point(
            point_path,
            deep=deep,
            cancelled=ctx.cancelled,
            on_progress=progress.report if deep else lambda _done, _total: None,
            on_damage=on_damage,
            reads=reads,
            rate_bytes_per_s=rate_bytes_per_s,
        )
    except CheckCancelled:
        ctx.check()
        raise


class _Progress:
    """What is new since the last report goes to the job."""

    def __init__(self, ctx: JobContext) -> None:
        self._ctx = ctx
        self._done = 0

    def report(self, done: int, total: int) -> None:
        self._ctx.set_total(total)
        self._ctx.add(scanned=done - self._done, read=done - self._done)
        self._done = done


def report_lines(report: CheckReport) -> tuple[str, ...]:
    """What a job's result says: a summary, then a line for each of the first findings."""
    count = len(report.findings) + report.more
    summary = (
        f"{count or 'no'} finding{'' if count == 1 else 's'} in {report.backups} backups, "
        f"{report.packs} packs, {report.chunks} chunks; {report.bytes_read} bytes read"
    )
    if report.packs_skipped:
        summary += f"; {report.packs_skipped} packs had been read before it was interrupted"
    return (
        summary,
        *(_line(finding) for finding in report.findings[:SHOWN_FINDINGS]),
        *(_disk_line(disk) for disk in report.disks[:SHOWN_FINDINGS]),
    )


def _disk_line(disk: DiskDamage) -> str:
    ranges = ", ".join(f"{offset}+{length}" for offset, length in disk.ranges)
    more = f" and {disk.range_count - len(disk.ranges)} more"
    return (
        f"disk {disk.disk} of backup {disk.backup}: {disk.size_bytes} of {disk.capacity} bytes "
        f"can't be restored, in {disk.range_count} ranges: {ranges}"
        f"{more if disk.range_count > len(disk.ranges) else ''}"
    )


def _line(finding: Finding) -> str:
    place = finding.path if finding.offset < 0 else f"{finding.path} at {finding.offset}"
    lost = f" (backups: {', '.join(finding.backups)})" if finding.backups else ""
    return f"{finding.kind}: {place}: {finding.detail}{lost}"
