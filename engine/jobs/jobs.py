"""Jobs: long work in bounded threads, with progress, cancelling, and a record that outlives us.

A job is queued, then running, then exactly one of succeeded, failed, cancelled. Its row is in the
state from before `submit` returns; while it runs the row is written again at most once a second,
and `job()` is always fresh. `settle` is called exactly once for every job that was submitted,
however it ends (also one that never ran), and before its end can be seen: whoever sees a finished
job sees its consequences.

After a restart nothing is left hanging: what was queued or running is failed by `recover`.

Locks: `_lock` guards the line and the tables; `_order` makes rows and events of one job go out in
order. `_lock` may be taken inside `_order`, never the other way round. Neither is held while a
handler or a `settle` runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from msgspec.structs import replace

from engine.errors import Cancelled, Conflict, EngineError, NotFound
from engine.ids import new_id
from engine.jobs.hangs import HangOf, log_hang, never
from engine.jobs.history import shortened
from engine.jobs.line import Line
from engine.jobs.progress import Counters, Speedometer, to_progress
from engine.model import Job, JobKind, Progress
from engine.state import State
from storage.errors import StorageError, shown

log = logging.getLogger(__name__)

KEPT_JOBS = 1_000  # finished ones that can still be looked at
ACTIVE_STATES = frozenset({"queued", "running"})

STOPPED = "interrupted: the service was stopped"
RESTARTED = "interrupted by a restart"


class JobContext:
    """What a running job's code talks to: the wish to cancel it, and its progress. Any thread."""

    def __init__(self, job_uuid: str = "", *, clock: Callable[[], float] = time.monotonic) -> None:
        self.job_uuid = job_uuid
        self._clock = clock
        self._lock = threading.Lock()
        self._counters = Counters()
        self._speed = Speedometer(clock())
        self._moved_s = clock()
        self._reason: Cancelled | None = None
        self.lines: tuple[str, ...] = ()  # becomes the job's result, also when it fails

    def begin(self) -> None:
        """The job's turn has come: how fast it is, and whether it gets on, is counted from now."""
        with self._lock:
            self._moved_s = self._clock()
            self._speed = Speedometer(self._moved_s)

    def cancelled(self) -> bool:
        """Whether the job is to end. Ask at every batch."""
        return self._reason is not None

    def check(self) -> None:
        """Raises Cancelled if the job is to end."""
        if self._reason is not None:
            raise Cancelled(self._reason.wish, str(self._reason))

    def cancel(self, reason: Cancelled) -> None:
        """Asks the job to end. The first reason stays."""
        with self._lock:
            self._reason = self._reason or reason

    def set_total(self, size_bytes: int) -> None:
        """How many bytes are to be scanned, or restored, in all."""
        with self._lock:
            self._counters.total = size_bytes
            self._moved_s = self._clock()

    def add(
        self,
        *,
        scanned: int = 0,
        read: int = 0,
        changed: int = 0,
        stored: int = 0,
        restored: int = 0,
    ) -> None:
        """Counts bytes on top of what was counted before. Once per batch, not per chunk."""
        with self._lock:
            counters = self._counters
            counters.scanned += scanned
            counters.read += read
            counters.changed += changed
            counters.stored += stored
            counters.restored += restored
            self._moved_s = self._clock()

    @property
    def still_s(self) -> float:
        """For how long nothing has been counted."""
        return self._clock() - self._moved_s

    def progress(self) -> Progress:
        """The present state, with the present rate."""
        with self._lock:
            rate = self._speed.reading(self._clock(), self._counters.done)
            return to_progress(self._counters, rate)

    def final_progress(self) -> Progress:
        """The state at the end: the rate is the mean over the job's whole time."""
        with self._lock:
            rate = self._speed.mean(self._clock(), self._counters.done)
            return replace(to_progress(self._counters, rate), eta_s=0.0)


Handler: TypeAlias = Callable[[JobContext], tuple[str, ...]]
Settle: TypeAlias = Callable[[Exception | None], None]
Listener: TypeAlias = Callable[[Job], None]


def _nothing_to_settle(_error: Exception | None) -> None:
    return None


@dataclass(slots=True, eq=False)
class _Active:
    """A job that has not ended. `job` changes under `_order` only."""

    job: Job
    handler: Handler
    settle: Settle
    context: JobContext
    ending: bool = False
    ended: threading.Event = field(default_factory=threading.Event)


class Jobs:
    """The jobs of this host. All methods may be called from any thread."""

    def __init__(
        self,
        state: State,
        *,
        max_running: int,
        tick_s: float = 1.0,
        clock: Callable[[], float] = time.time,
        hang_of: HangOf = never,
    ) -> None:
        self._state = state
        self._hang_of = hang_of
        self._clock = clock
        self._tick_s = tick_s
        self._lock = threading.Lock()
        self._order = threading.RLock()
        self._stopping = False
        self._line = Line[_Active](self._lock, max_running)
        self._active: dict[str, _Active] = {}
        self._finished: dict[str, Job] = {}
        self._listeners: list[Listener] = []
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"job-{n}", daemon=True)
            for n in range(self._line.most_at_once)
        ]
        self._ticker = threading.Thread(target=self._tick, name="job-progress", daemon=True)

    # Life -----------------------------------------------------------------------------------

    def recover(self) -> list[Job]:
        """Fails what a former process left queued or running; returns those. Before `start`."""
        rows = sorted(self._state.jobs.values(), key=_age)
        left = [self._finish_row(row, RESTARTED) for row in rows if row.state in ACTIVE_STATES]
        self._state.jobs.put_all(left)
        changed = {row.uuid: row for row in left}
        self._finished = {row.uuid: changed.get(row.uuid, row) for row in rows}
        self._prune()
        return left

    def start(self) -> None:
        """Starts the threads. What was submitted before begins to run."""
        for thread in [*self._threads, self._ticker]:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """Refuses new jobs, ends all others as interrupted, and returns within `timeout_s`.

        A running job gets the time to end by itself; one that does not is recorded as failed and
        left to its thread, which dies with the process. Waiting ones that there is no time to
        settle are left to the next start, as after a kill.
        """
        reason = Cancelled("interrupted", STOPPED)
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._stopping = True
            waiting = self._line.close()
            running = [active for active in self._active.values() if active not in waiting]
        for active in running:
            active.context.cancel(reason)
        for active in waiting:
            if time.monotonic() < deadline_s:
                self._end(active, reason, ())
        for active in running:
            if not active.ended.wait(max(deadline_s - time.monotonic(), 0)):
                log.warning("job_abandoned", extra={"job": active.job.uuid})
                self._end(active, reason, ())
        self._stopped.set()

    # Verbs ----------------------------------------------------------------------------------

    def submit(self, job: Job, handler: Handler, settle: Settle = _nothing_to_settle) -> Job:
        """Queues `job`; its row is durable on return. Conflict(shutting_down) when we stop.

        `settle(None)` follows a handler that returned, `settle(error)` anything else.
        """
        queued = replace(job, state="queued", created_at=self._clock())
        active = _Active(queued, handler, settle, JobContext(queued.uuid))
        self.refuse_if_stopping()
        with self._order:
            self._state.jobs.put(queued)
            with self._lock:
                late = self._stopping
                if not late:
                    self._active[queued.uuid] = active
                    self._line.add(active)
            if late:
                self._state.jobs.delete(queued.uuid)
                raise _shutting_down()
            self._tell(queued)
        return queued

    def refuse_if_stopping(self) -> None:
        """Raises Conflict(shutting_down) once `stop` was called."""
        if self._stopping:
            raise _shutting_down()

    def cancel(self, uuid: str) -> None:
        """Ends a queued job now, asks a running one to end. Conflict(job_finished), NotFound."""
        reason = Cancelled("cancelled", "cancelled")
        with self._lock:
            active = self._active.get(uuid)
            queued = active is not None and self._line.remove(active)
        if active is None or active.ending:
            state = self.job(uuid).state
            raise Conflict("job_finished", f"job {uuid} is not running any more: {state}")
        active.context.cancel(reason)
        if queued:
            self._end(active, reason, ())

    def job(self, uuid: str) -> Job:
        """One job, fresh. NotFound."""
        with self._lock:
            active = self._active.get(uuid)
            done = self._finished.get(uuid)
        if active is not None:
            return self._fresh(active)
        if done is None:
            raise NotFound("job", uuid)
        return done

    def jobs(self) -> list[Job]:
        """All active ones and the newest KEPT_JOBS finished ones, newest first."""
        with self._lock:
            active = list(self._active.values())
            done = list(self._finished.values())
        return sorted([*(self._fresh(one) for one in active), *done], key=_age, reverse=True)

    def find_active(self, kind: JobKind, point_uuid: str, deep: bool) -> Job | None:
        """An equal maintenance job that has not ended, nor been told to."""
        with self._lock:
            jobs = [one.job for one in self._active.values() if not one.context.cancelled()]
        wanted = (kind, point_uuid, deep)
        return next((j for j in jobs if (j.kind, j.backup_point_uuid, j.deep) == wanted), None)

    def active_on(self, point_uuid: str) -> bool:
        """Whether a job that has not ended works on this point."""
        with self._lock:
            return any(one.job.backup_point_uuid == point_uuid for one in self._active.values())

    def wait(self, uuid: str, timeout_s: float) -> Job:
        """The job once it has ended, or as it is after `timeout_s`. NotFound."""
        with self._lock:
            active = self._active.get(uuid)
        if active is not None:
            active.ended.wait(timeout_s)
        return self.job(uuid)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Calls `listener` at every change of a job, in order, from our threads.

        It has to be quick, and must not call us. Returns what ends the subscription.
        """
        with self._lock:
            self._listeners.append(listener)

        def unsubscribe() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return unsubscribe

    # Threads --------------------------------------------------------------------------------

    def _work(self) -> None:
        while (active := self._line.take()) is not None:
            active.context.begin()
            self._publish(active, state="running", started_at=self._clock())
            error: Exception | None = None
            result: tuple[str, ...] = ()
            try:
                active.context.check()
                result = active.handler(active.context)
            except Exception as raised:  # noqa: BLE001 - whatever it is, it is the job's outcome
                error = raised
            self._end(active, error, result)
            self._line.give_back(active)

    def _tick(self) -> None:
        while not self._stopped.wait(self._tick_s):
            with self._lock:
                running = [one for one in self._active.values() if one.job.state == "running"]
            now = {active: self._fresh(active) for active in running}
            self._line.note_hanging([active for active, job in now.items() if job.stalled_on])
            for active, fresh in now.items():
                log_hang(active.job, fresh)
                self._publish(
                    active,
                    progress=fresh.progress,
                    stalled_s=fresh.stalled_s,
                    stalled_on=fresh.stalled_on,
                )

    def _fresh(self, active: _Active) -> Job:
        """The job with its progress, and with what it hangs on, as they are now."""
        job = active.job
        if job.state != "running":
            return job
        hang = self._hang_of(job, active.context.still_s)
        return replace(
            job,
            progress=active.context.progress(),
            stalled_s=float(int(hang.seconds)),
            stalled_on=hang.on,
        )

    # Ends -----------------------------------------------------------------------------------

    def _end(self, active: _Active, error: Exception | None, result: tuple[str, ...]) -> None:
        """Settles and records the end, unless somebody else does so already."""
        with self._lock:
            if active.ending:
                return
            active.ending = True
        error = self._judge(active, error)
        try:
            active.settle(error)
        except Exception as unsettled:
            log.exception("job_not_settled", extra={"job": active.job.uuid})
            error = error or unsettled
        row = self._finish_row(active.job, _reason_of(error), error)
        lines = tuple(map(shown, result or active.context.lines))
        self._record_end(active, replace(row, result=lines, progress=_last_progress(active)))

    def _judge(self, active: _Active, error: Exception | None) -> Exception | None:
        """The error that counts: what a cancelled job raises follows from the cancelling."""
        if error is None or isinstance(error, Cancelled):
            return error
        if not isinstance(error, EngineError | StorageError):
            log.error("job_crashed", extra={"job": active.job.uuid}, exc_info=error)
        try:
            active.context.check()
        except Cancelled as reason:
            return reason
        return error

    def _finish_row(self, row: Job, reason: str, error: Exception | None = None) -> Job:
        state = "failed" if reason else "succeeded"
        if isinstance(error, Cancelled) and error.wish == "cancelled":
            state = "cancelled"
        return replace(
            row,
            state=state,
            error=reason,
            finished_at=self._clock(),
            stalled_s=0.0,
            stalled_on="",
        )

    def _record_end(self, active: _Active, row: Job) -> None:
        with self._order:
            self._keep(row)
            active.job = row
            with self._lock:
                del self._active[row.uuid]
                self._finished[row.uuid] = row
            self._prune()
            self._tell(row)
            active.ended.set()
        fields = {"job": row.uuid, "kind": row.kind, "state": row.state, "error": row.error}
        log.info("job_ended", extra=fields)

    def _publish(self, active: _Active, **changes: object) -> None:
        """Puts a running job's row and tells the listeners; nothing once it ends."""
        with self._order:
            if active.ending:
                return
            row = replace(active.job, **changes)
            if row == active.job:
                return
            active.job = row
            self._keep(row)
            self._tell(row)

    def _keep(self, row: Job) -> None:
        try:
            self._state.jobs.put(row)
        except StorageError:
            # The job itself goes on; after a restart it counts as interrupted.
            log.exception("job_not_recorded", extra={"job": row.uuid})

    def _tell(self, row: Job) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener(row)
            except Exception:
                log.exception("job_listener_failed", extra={"job": row.uuid})

    def _prune(self) -> None:
        with self._lock:
            excess = list(self._finished)[: max(len(self._finished) - KEPT_JOBS, 0)]
            for uuid in excess:
                del self._finished[uuid]
            cut = shortened(reversed(self._finished.values()))
            self._finished |= {row.uuid: row for row in cut}  # each keeps its place
        if excess or cut:
            try:
                self._state.jobs.delete(*excess)
                self._state.jobs.put_all(cut)
            except StorageError:
                log.exception("jobs_not_pruned")


def new_job(
    kind: JobKind,
    *,
    backup_uuid: str = "",
    compute_uuid: str = "",
    backup_point_uuid: str = "",
    deep: bool = False,
) -> Job:
    """A job row with a fresh uuid, for `Jobs.submit`."""
    return Job(
        uuid=new_id(),
        kind=kind,
        backup_uuid=backup_uuid,
        compute_uuid=compute_uuid,
        backup_point_uuid=backup_point_uuid,
        deep=deep,
    )


def _last_progress(active: _Active) -> Progress:
    ran = active.job.started_at > 0
    return active.context.final_progress() if ran else active.job.progress


def _reason_of(error: Exception | None) -> str:
    if error is None:
        return ""
    if isinstance(error, EngineError | StorageError):
        return str(error) or type(error).__name__
    return shown(f"{type(error).__name__}: {error}")


def _age(job: Job) -> tuple[float, str]:
    return (job.created_at, job.uuid)


def _shutting_down() -> Conflict:
    return Conflict("shutting_down", "the service is being stopped")
