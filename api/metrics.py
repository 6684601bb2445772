"""/metrics: what Prometheus is told. Names begin with `vmkeep_`; units last.

Counts of requests are kept here; all else is asked of the engine when it is scraped.
"""

from __future__ import annotations

import os
from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from engine.model import BACKUP_DONE, BACKUP_FAILED, BACKUP_RUNNING
from engine.service import Engine
from engine.verb_types import BackupQuery

_JOB_STATES = ("queued", "running", "succeeded", "failed", "cancelled")
_BACKUP_STATUSES = {BACKUP_DONE: "done", BACKUP_RUNNING: "running", BACKUP_FAILED: "failed"}
_MOST_ROWS = 1000  # of one page


class Metrics:
    """A registry of our own, so that two servers in a process don't share their counts."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._requests = Counter(
            "vmkeep_requests",
            "Requests that were answered.",
            ("route", "scode"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "vmkeep_request_seconds",
            "Time from a request's head to its answer.",
            ("route",),
            registry=self._registry,
        )
        self._registry.register(_EngineCollector(engine))

    def observe(self, route: str, scode: int, seconds: float) -> None:
        """Counts one answered request. `route` is a path pattern of ours, never the client's."""
        self._requests.labels(route, str(scode)).inc()
        self._seconds.labels(route).observe(seconds)

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        yield from self._jobs()
        yield self._backups()
        yield from self._points()
        yield from self._tracking()
        yield self._hypervisors()
        yield GaugeMetricFamily(
            "vmkeep_state_silent_seconds",
            "How long the data directory's disk has not answered a write that waits for it.",
            self._engine.state_silent_s(),
        )

    def _jobs(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("vmkeep_jobs", "Jobs by state.", labels=["state"])
        jobs = self._engine.jobs()
        tally: Tally[str] = Tally(job.state for job in jobs)
        for state in _JOB_STATES:
            family.add_metric([state], tally[state])
        yield family
        longest: dict[str, float] = {}
        for job in jobs:
            if job.stalled_on:
                longest[job.stalled_on] = max(job.stalled_s, longest.get(job.stalled_on, 0.0))
        stalled = GaugeMetricFamily(
            "vmkeep_jobs_stalled_seconds",
            "The longest standstill of a job, by what does not answer.",
            labels=["on"],
        )
        for on, seconds in longest.items():
            stalled.add_metric([on], seconds)
        yield stalled

    def _backups(self) -> Metric:
        family = GaugeMetricFamily("vmkeep_backups", "Backups by status.", labels=["status"])
        tally: Tally[int] = Tally()
        page, seen, total = 1, 0, 1
        while seen < total:
            found = self._engine.backups(BackupQuery(page=page, page_size=_MOST_ROWS))
            tally.update(row.status for row in found.rows)
            page, seen, total = page + 1, seen + _MOST_ROWS, found.total
        for status, name in _BACKUP_STATUSES.items():
            family.add_metric([name], tally[status])
        return family

    def _tracking(self) -> Iterator[Metric]:
        off = GaugeMetricFamily(
            "vmkeep_tracking_off",
            "1 = a sample proved the tracking of this disk's changes wrong; it is scanned.",
            labels=["compute", "target_device"],
        )
        pinned = GaugeMetricFamily(
            "vmkeep_tracking_pinned_bytes",
            "Room in the pool that the clone kept for tracking takes up.",
            labels=["compute", "target_device", "pool"],
        )
        for state in self._engine.tracking():
            names = [state.vm_uuid, state.target_device]
            off.add_metric(names, float(bool(state.off)))
            pinned.add_metric([*names, os.path.dirname(state.volume)], state.pinned_bytes)
        yield off
        yield pinned
        stuns = self._engine.stuns()
        for name, stun in (("clone", stuns.clone), ("freeze", stuns.freeze)):
            text = f"How long VMs stood still for a {name}."
            yield SummaryMetricFamily(f"vmkeep_{name}_seconds", text, stun.count, stun.sum_s)
            longest = f"vmkeep_{name}_longest_seconds"
            yield GaugeMetricFamily(longest, "The longest since the start.", stun.longest_s)

    def _hypervisors(self) -> Metric:
        up = GaugeMetricFamily(
            "vmkeep_hypervisor_online", "1 = this libvirt answers and lets us in.", labels=["host"]
        )
        for state in self._engine.hypervisors():
            up.add_metric([state.name], float(not state.problem))
        return up

    def _points(self) -> Iterator[Metric]:
        states = self._engine.points()
        labels = ["backup_point", "name"]
        gauges = {
            "capacity": "Size of the point's file system.",
            "free": "Room left on the point.",
            "stored": "Bytes of stored chunks.",
            "logical": "Bytes of all backed-up volumes.",
        }
        families = {
            name: GaugeMetricFamily(f"vmkeep_point_{name}_bytes", text, labels=labels)
            for name, text in gauges.items()
        }
        up = GaugeMetricFamily("vmkeep_point_online", "1 = the point is usable.", labels=labels)
        for state in states:
            names = [state.point.uuid, state.point.name]
            families["capacity"].add_metric(names, state.capacity)
            families["free"].add_metric(names, state.free)
            families["stored"].add_metric(names, state.stored_bytes)
            families["logical"].add_metric(names, state.logical_bytes)
            up.add_metric(names, float(state.state == "online"))
        yield from families.values()
        yield up
