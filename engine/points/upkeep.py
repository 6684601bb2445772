"""Maintenance of a point as jobs: verify, gc, rebuild."""

from __future__ import annotations

import os
from collections.abc import Callable

from engine.core import Core
from engine.errors import Invalid
from engine.ids import normal
from engine.jobs.jobs import JobContext, new_job
from engine.points.distrust import remember_distrusted
from engine.points.keeper import Opened
from engine.points.pack_reads import PackReads
from engine.points.verify import report_lines, run_verify
from engine.verb_types import Maintenance
from storage.check.against_rebuild import check_view
from storage.check.check import Damage
from storage.domain.domain import Domain
from storage.domain.gc import GcReport
from storage.errors import Damaged, PointNewerFormat, StorageError


def start_maintenance(core: Core, kind: Maintenance, point_uuid: str, deep: bool) -> str:
    """The job's uuid; that of an equal one if one has not ended yet. NotFound, StorageError."""
    handlers: dict[Maintenance, Callable[[JobContext], tuple[str, ...]]] = {
        "verify": lambda ctx: _verify(core, point_uuid, deep, ctx),
        "gc": lambda ctx: _gc(core, point_uuid, ctx),
        "rebuild": lambda ctx: _rebuild(core, point_uuid, ctx),
    }
    if kind not in handlers:
        raise Invalid("kind", f"{kind!r} is not one of {', '.join(handlers)}")
    core.jobs.refuse_if_stopping()
    point_uuid = normal(point_uuid)
    core.points.opened(point_uuid)
    under_way = core.jobs.find_active(kind, point_uuid, deep)
    if under_way is not None:
        return under_way.uuid
    job = new_job(kind, backup_point_uuid=point_uuid, deep=deep)
    return core.jobs.submit(
        job, handlers[kind], lambda _error: core.points.look_again(point_uuid)
    ).uuid


def _verify(core: Core, point_uuid: str, deep: bool, ctx: JobContext) -> tuple[str, ...]:
    """Fails when data is lost or in doubt, or a newer vmkeep has written to a domain of ours; of
    another's, the job's result says so, as it says all findings."""
    opened = core.points.opened(point_uuid)
    reads = PackReads(core.state, point_uuid, core.clock) if deep else None
    manifests: dict[str, set[str]] = {}

    def on_damage(damage: Damage) -> None:
        domain = opened.domains.get(damage.cluster)
        if damage.manifest:
            manifests.setdefault(damage.cluster, set()).add(damage.manifest)
        elif domain is not None:
            domain.trust.withdraw(damage.pack, frozenset({damage.chunk}) if damage.chunk else None)

    try:
        report = run_verify(
            opened.point.path,
            deep,
            ctx,
            reads=reads,
            on_damage=on_damage,
            rate_bytes_per_s=core.config.limits.verify_bytes_per_s,
        )
        ctx.lines = report_lines(report)  # whatever fails from here on
    finally:
        if reads is not None:
            reads.flush()
        remember_distrusted(core.state, core.points, point_uuid, opened.domains)
    if reads is not None:
        reads.end()
        for _, domain in opened.sound():
            for finding in check_view(domain):
                report.add(finding)
    lines = report_lines(report)
    for cluster, names in manifests.items():
        lines += _rewritten(opened, cluster, names)
    ctx.lines = lines
    if not report.clean:
        raise Damaged(ctx.lines[0])
    ours = {cluster.uuid for cluster in core.inventory.places.clusters}
    for finding in report.unread:
        if os.path.basename(finding.path) in ours:
            raise PointNewerFormat(finding.detail)
    return ctx.lines


def _rewritten(opened: Opened, cluster: str, names: set[str]) -> tuple[str, ...]:
    """Damaged manifests of our own domains are written anew, as far as their views know them."""
    domain = opened.domains.get(cluster)
    try:
        count = domain.rewrite_manifests(names) if domain is not None else 0
    except StorageError as error:
        return (f"damaged manifests could not be written anew: {error}",)
    return (f"manifests of {count} disks written anew from the view",) if count else ()


def _gc(core: Core, point_uuid: str, ctx: JobContext) -> tuple[str, ...]:
    gc = core.config.gc

    def collect(domain: Domain) -> list[str]:
        report = domain.reclaim(
            sparse_below=gc.sparse_below,
            copy_budget_bytes=gc.copy_budget_bytes,
            cancelled=ctx.cancelled,
        )
        return _gc_lines(report)

    lines = _in_each_domain(core, point_uuid, ctx, collect)
    ctx.check()  # one that was cut short says what it did, but not that it did all
    return lines


def _gc_lines(report: GcReport) -> list[str]:
    return [
        f"{report.packs_removed} packs of {report.bytes_removed} bytes removed, "
        f"{report.packs_repacked} of them repacked by copying {report.bytes_copied} bytes; "
        f"{report.orphans_removed} orphans removed, {report.chains_folded} chains folded",
        *(f"damaged: {detail}" for detail in report.damaged),
        *(["no room to repack sparse packs in"] if report.short_of_room else []),
    ]


def _rebuild(core: Core, point_uuid: str, ctx: JobContext) -> tuple[str, ...]:
    def make_anew(domain: Domain) -> list[str]:
        domain.rebuild()
        stats = domain.stats()
        counts = f"{stats.backups} backups, {stats.packs} packs, {stats.chunks} chunks"
        return [f"view made anew: {counts}"]

    return _in_each_domain(core, point_uuid, ctx, make_anew)


def _in_each_domain(
    core: Core, point_uuid: str, ctx: JobContext, work: Callable[[Domain], list[str]]
) -> tuple[str, ...]:
    """What `work` says of each cluster's domain. One that fails, or is damaged and so left alone,
    keeps none of the others from it; the lines name it, and the job fails with its reason. What it
    found damaged is remembered."""
    failures: list[StorageError] = []
    for cluster in core.inventory.places.clusters:
        ctx.check()
        try:
            lines = work(core.points.domain(point_uuid, cluster.uuid))
        except StorageError as error:
            failures.append(error)
            lines = [f"failed: cluster {cluster.name}: {error}"]
        finally:
            remember_distrusted(core.state, core.points, point_uuid, (cluster.uuid,))
        ctx.lines = (*ctx.lines, *lines)
    if failures:
        raise failures[0]
    return ctx.lines
