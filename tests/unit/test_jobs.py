"""engine.jobs.jobs: one end for every job, settled once, before it can be seen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest

from engine.errors import Cancelled, Conflict, NotFound
from engine.jobs import jobs as engine_jobs
from engine.jobs.hangs import NO_HANG, Hang
from engine.jobs.history import KEPT_RESULT_CHARS
from engine.jobs.jobs import KEPT_JOBS, RESTARTED, STOPPED, Handler, JobContext, Jobs, new_job
from engine.jobs.line import MOST_HANGING
from engine.model import Job, JobState
from engine.state import State
from storage.errors import PointFull

PATIENCE_S = 20.0


@pytest.fixture
def jobs(state: State) -> Iterator[Jobs]:
    made = Jobs(state, max_running=2, tick_s=0.01)
    made.start()
    yield made
    made.stop(PATIENCE_S)


def nothing(_ctx: JobContext) -> tuple[str, ...]:
    return ()


class Gate:
    """A handler that waits until it is let through, or told to end."""

    def __init__(self) -> None:
        self.runs = threading.Event()
        self.free = threading.Event()

    def __call__(self, ctx: JobContext) -> tuple[str, ...]:
        self.runs.set()
        while not self.free.wait(0.005):
            ctx.check()
        return ("through",)


def test_a_job_succeeds_with_a_result_and_is_recorded(jobs: Jobs, state: State) -> None:
    queued = jobs.submit(new_job("verify", deep=True), lambda _: ("all well",))
    ended = jobs.wait(queued.uuid, PATIENCE_S)
    assert (ended.state, ended.result, ended.error) == ("succeeded", ("all well",), "")
    assert ended.created_at <= ended.started_at <= ended.finished_at
    assert state.jobs.get(queued.uuid) == ended
    assert jobs.jobs() == [ended]


def test_what_is_said_of_a_name_that_is_not_unicode_can_be_kept(jobs: Jobs, state: State) -> None:
    """Else the job would never end, and the thread that had it would be gone."""

    def crash(ctx: JobContext) -> tuple[str, ...]:
        ctx.lines = ("found \udcff",)
        raise RuntimeError("at \udcfe")

    for _ in range(3):
        ended = jobs.wait(jobs.submit(new_job("verify"), crash).uuid, PATIENCE_S)
        assert (ended.error, ended.result) == (r"RuntimeError: at \udcfe", (r"found \udcff",))
        assert state.jobs.get(ended.uuid) == ended


def test_failures_give_their_reason(jobs: Jobs) -> None:
    def full(ctx: JobContext) -> tuple[str, ...]:
        ctx.lines = ("half done",)
        raise PointFull("no room on nas")

    def crash(_ctx: JobContext) -> tuple[str, ...]:
        raise KeyError("oops")

    one = jobs.wait(jobs.submit(new_job("backup"), full).uuid, PATIENCE_S)
    assert (one.state, one.error, one.result) == ("failed", "no room on nas", ("half done",))
    two = jobs.wait(jobs.submit(new_job("backup"), crash).uuid, PATIENCE_S)
    assert (two.state, two.error) == ("failed", "KeyError: 'oops'")
    # The threads are still there.
    three = jobs.wait(jobs.submit(new_job("backup"), nothing).uuid, PATIENCE_S)
    assert three.state == "succeeded"


def test_no_more_than_the_limit_run_and_all_get_their_turn(jobs: Jobs) -> None:
    lock, together = threading.Lock(), [0, 0]
    both = threading.Barrier(2)

    def count(_ctx: JobContext) -> tuple[str, ...]:
        with lock:
            together[0] += 1
            together[1] = max(together)
        both.wait(PATIENCE_S)
        with lock:
            together[0] -= 1
        return ()

    made = [jobs.submit(new_job("gc"), count) for _ in range(8)]
    assert [jobs.wait(job.uuid, PATIENCE_S).state for job in made] == ["succeeded"] * 8
    assert together[1] == 2


def test_settled_once_before_the_end_is_seen(jobs: Jobs) -> None:
    settled: list[tuple[str, Exception | None]] = []
    seen: list[tuple[str, int]] = []
    jobs.subscribe(lambda job: seen.append((job.state, len(settled))))
    for handler in (nothing, _raising):
        job = jobs.submit(new_job("backup"), handler, lambda error: settled.append(("", error)))
        jobs.wait(job.uuid, PATIENCE_S)
    assert settled[0] == ("", None)
    assert isinstance(settled[1][1], PointFull)
    ends = [entry for entry in seen if entry[0] in ("succeeded", "failed")]
    assert ends == [("succeeded", 1), ("failed", 2)]


def _raising(_ctx: JobContext) -> tuple[str, ...]:
    raise PointFull("full")


def test_a_job_that_cannot_be_settled_failed(jobs: Jobs) -> None:
    def settle(_error: Exception | None) -> None:
        raise PointFull("state is full")

    ended = jobs.wait(jobs.submit(new_job("backup"), nothing, settle).uuid, PATIENCE_S)
    assert (ended.state, ended.error) == ("failed", "state is full")


def test_cancelling(jobs: Jobs) -> None:
    gates = [Gate(), Gate(), Gate()]
    errors: list[Exception | None] = []
    made = [jobs.submit(new_job("backup"), gate, errors.append) for gate in gates]
    assert gates[0].runs.wait(PATIENCE_S)
    assert gates[1].runs.wait(PATIENCE_S)
    jobs.cancel(made[2].uuid)
    assert jobs.job(made[2].uuid).state == "cancelled"
    assert not gates[2].runs.is_set()
    jobs.cancel(made[0].uuid)
    ended = jobs.wait(made[0].uuid, PATIENCE_S)
    assert (ended.state, ended.error) == ("cancelled", "cancelled")
    assert all(isinstance(error, Cancelled) for error in errors)
    assert len(errors) == 2
    for uuid in (made[0].uuid, made[2].uuid):
        with pytest.raises(Conflict) as caught:
            jobs.cancel(uuid)
        assert caught.value.code == "job_finished"
    with pytest.raises(NotFound):
        jobs.cancel("nobody")
    gates[1].free.set()
    assert jobs.wait(made[1].uuid, PATIENCE_S).result == ("through",)


def test_the_rate_is_that_of_the_work_not_of_the_wait(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(engine_jobs, "JobContext", partial(JobContext, clock=lambda: now[0]))
    jobs, gate = Jobs(state, max_running=1), Gate()
    jobs.start()
    jobs.submit(new_job("backup"), gate)

    def work(ctx: JobContext) -> tuple[str, ...]:
        assert ctx.still_s == 0
        ctx.set_total(100)
        now[0] += 10
        ctx.add(restored=100)
        return ()

    waits = jobs.submit(new_job("restore"), work)
    now[0] = 3600.0
    gate.free.set()
    assert jobs.wait(waits.uuid, PATIENCE_S).progress.rate == 10
    jobs.stop(PATIENCE_S)


def test_a_job_that_hangs_gives_its_place_to_the_next(state: State) -> None:
    hanging: set[str] = set()

    def hang_of(job: Job, _still_s: float) -> Hang:
        return Hang(40, "backup point p") if job.uuid in hanging else NO_HANG

    jobs = Jobs(state, max_running=1, tick_s=0.01, hang_of=hang_of)
    jobs.start()
    gates = [Gate() for _ in range(3)]
    made = [jobs.submit(new_job("backup"), gate) for gate in gates]
    assert gates[0].runs.wait(PATIENCE_S)
    assert not gates[1].runs.wait(0.2)
    hanging.add(made[0].uuid)
    assert gates[1].runs.wait(PATIENCE_S)
    assert not gates[2].runs.wait(0.2)
    hanging.clear()
    gates[0].free.set()
    assert jobs.wait(made[0].uuid, PATIENCE_S).state == "succeeded"
    assert not gates[2].runs.wait(0.2)  # the second one has the place
    gates[1].free.set()
    assert gates[2].runs.wait(PATIENCE_S)
    gates[2].free.set()
    jobs.stop(PATIENCE_S)


def test_only_so_many_jobs_hang_at_once(state: State) -> None:
    hang = Hang(40, "backup point p")
    jobs = Jobs(state, max_running=1, tick_s=0.01, hang_of=lambda *_: hang)
    jobs.start()
    gates = [Gate() for _ in range(MOST_HANGING + 2)]
    for gate in gates:
        jobs.submit(new_job("backup"), gate)
    assert all(gate.runs.wait(PATIENCE_S) for gate in gates[:-1])
    assert not gates[-1].runs.wait(0.2)
    gates[0].free.set()
    assert gates[-1].runs.wait(PATIENCE_S)
    jobs.stop(PATIENCE_S)


def test_who_asks_again_after_a_cancel_does_not_get_the_job_that_is_ending(jobs: Jobs) -> None:
    gate, free = Gate(), threading.Event()

    def ends_late(ctx: JobContext) -> tuple[str, ...]:
        try:
            return gate(ctx)
        finally:
            free.wait(PATIENCE_S)

    job = jobs.submit(new_job("verify", backup_point_uuid="p"), ends_late)
    assert gate.runs.wait(PATIENCE_S)
    found = jobs.find_active("verify", "p", deep=False)
    assert found is not None
    assert found.uuid == job.uuid
    jobs.cancel(job.uuid)
    assert jobs.find_active("verify", "p", deep=False) is None
    free.set()


def test_what_a_cancelled_job_raises_does_not_hide_that_it_was_cancelled(jobs: Jobs) -> None:
    gate = Gate()

    def stumble(ctx: JobContext) -> tuple[str, ...]:
        try:
            return gate(ctx)
        except Cancelled:
            raise PointFull("the session was gone") from None

    job = jobs.submit(new_job("backup"), stumble)
    assert gate.runs.wait(PATIENCE_S)
    jobs.cancel(job.uuid)
    assert jobs.wait(job.uuid, PATIENCE_S).state == "cancelled"


def test_stop_ends_the_queued_and_the_running(state: State) -> None:
    jobs = Jobs(state, max_running=1)
    jobs.start()
    gate, errors = Gate(), list[Exception | None]()
    running = jobs.submit(new_job("backup"), gate, errors.append)
    queued = jobs.submit(new_job("restore"), nothing, errors.append)
    assert gate.runs.wait(PATIENCE_S)
    jobs.stop(PATIENCE_S)
    for uuid in (running.uuid, queued.uuid):
        row = state.jobs.get(uuid)
        assert row is not None
        assert (row.state, row.error) == ("failed", STOPPED)
    assert len(errors) == 2
    with pytest.raises(Conflict) as caught:
        jobs.submit(new_job("backup"), nothing)
    assert caught.value.code == "shutting_down"
    assert len(state.jobs.values()) == 2


def test_stop_does_not_wait_for_a_job_that_hangs(state: State) -> None:
    jobs = Jobs(state, max_running=1)
    jobs.start()
    hung, runs, errors = threading.Event(), threading.Event(), list[Exception | None]()

    def hang(_ctx: JobContext) -> tuple[str, ...]:
        runs.set()
        hung.wait(PATIENCE_S)
        return ()

    job = jobs.submit(new_job("backup"), hang, errors.append)
    assert runs.wait(PATIENCE_S)
    jobs.stop(0.05)
    assert jobs.job(job.uuid).state == "failed"
    # Its late end changes nothing and settles nothing a second time.
    hung.set()
    for thread in jobs._threads:
        thread.join(PATIENCE_S)
    assert jobs.job(job.uuid).error == STOPPED
    assert len(errors) == 1


def test_stop_leaves_what_it_has_no_time_for_to_the_next_start(state: State) -> None:
    jobs = Jobs(state, max_running=1)
    settled = threading.Event()

    def settle(_error: Exception | None) -> None:
        settled.wait(PATIENCE_S)

    # None of them runs: it was not started.
    asked = [jobs.submit(new_job("backup"), nothing, settle).uuid for _ in range(3)]
    stopping = threading.Thread(target=jobs.stop, args=(0.0,))
    stopping.start()
    stopping.join(PATIENCE_S / 2)
    settled.set()
    assert not stopping.is_alive()
    assert sorted(job.uuid for job in Jobs(state, max_running=1).recover()) == sorted(asked)


def test_recovery_fails_what_was_left(state: State) -> None:
    states: list[JobState] = ["queued", "running", "succeeded", "cancelled"]
    for number, name in enumerate(states):
        state.jobs.put(Job(uuid=name, kind="backup", state=name, created_at=float(number)))
    jobs = Jobs(state, max_running=1)
    assert {job.uuid for job in jobs.recover()} == {"queued", "running"}
    assert [(job.uuid, job.state) for job in jobs.jobs()] == [
        ("cancelled", "cancelled"),
        ("succeeded", "succeeded"),
        ("running", "failed"),
        ("queued", "failed"),
    ]
    assert jobs.job("running").error == RESTARTED
    assert Jobs(state, max_running=1).recover() == []


def test_old_jobs_are_forgotten(state: State) -> None:
    state.jobs.put_all(
        Job(uuid=f"{n:05}", kind="gc", state="succeeded", created_at=float(n))
        for n in range(KEPT_JOBS + 10)
    )
    jobs = Jobs(state, max_running=1)
    jobs.recover()
    assert len(jobs.jobs()) == len(state.jobs.values()) == KEPT_JOBS
    with pytest.raises(NotFound):
        jobs.job("00009")


def test_only_the_newest_jobs_keep_long_results(state: State) -> None:
    lines = ("7 findings", *["x" * 1023] * (KEPT_RESULT_CHARS // 1024 // 2))
    cut = ("7 findings", f"{len(lines) - 1} more lines are not kept any more")
    state.jobs.put_all(
        Job(uuid=f"{n}", kind="verify", state="failed", created_at=float(n), result=lines)
        for n in range(4)
    )
    jobs = Jobs(state, max_running=1)
    jobs.recover()
    assert [job.result for job in jobs.jobs()] == [lines, lines, cut, cut]
    jobs.start()
    new = jobs.submit(new_job("verify"), lambda _: lines * 3).uuid
    assert jobs.wait(new, PATIENCE_S).result == lines * 3
    jobs.stop(PATIENCE_S)
    assert [job.result for job in jobs.jobs()] == [lines * 3, cut, cut, cut, cut]
    assert [job.uuid for job in jobs.jobs()] == [new, "3", "2", "1", "0"]
    assert sorted(state.jobs.values(), key=lambda job: job.created_at) == jobs.jobs()[::-1]


def test_listeners_see_every_state_in_order_and_may_fail(jobs: Jobs) -> None:
    seen: list[str] = []
    gate = Gate()

    def bad(_job: Job) -> None:
        raise RuntimeError("listener")

    def work(ctx: JobContext) -> tuple[str, ...]:
        ctx.set_total(100)
        ctx.add(scanned=60, read=50, changed=40, stored=30)
        return gate(ctx)

    progressed = threading.Event()

    def listen(job: Job) -> None:
        seen.append(job.state)
        if job.progress.bytes_scanned == 60 and job.state == "running":
            progressed.set()

    jobs.subscribe(bad)
    unsubscribe = jobs.subscribe(listen)
    job = jobs.submit(new_job("backup"), work)
    assert progressed.wait(PATIENCE_S)
    fresh = jobs.job(job.uuid).progress
    assert (fresh.bytes_total, fresh.bytes_read, fresh.bytes_changed) == (100, 50, 40)
    gate.free.set()
    ended = jobs.wait(job.uuid, PATIENCE_S)
    assert (ended.progress.bytes_stored, ended.progress.eta_s) == (30, 0.0)
    assert [seen[0], seen[1], seen[-1]] == ["queued", "running", "succeeded"]
    assert set(seen[1:-1]) == {"running"}
    unsubscribe()
    count = len(seen)
    jobs.wait(jobs.submit(new_job("backup"), nothing).uuid, PATIENCE_S)
    assert len(seen) == count


def test_an_equal_maintenance_job_is_found_until_it_ends(jobs: Jobs) -> None:
    gate = Gate()
    handler: Handler = gate
    job = jobs.submit(new_job("verify", backup_point_uuid="p", deep=True), handler)
    found = jobs.find_active("verify", "p", deep=True)
    assert found is not None
    assert found.uuid == job.uuid
    assert jobs.find_active("verify", "p", deep=False) is None
    assert jobs.active_on("p")
    gate.free.set()
    jobs.wait(job.uuid, PATIENCE_S)
    assert jobs.find_active("verify", "p", deep=True) is None
    assert not jobs.active_on("p")


def test_rate_and_eta() -> None:
    now = [100.0]
    ctx = JobContext(clock=lambda: now[0])
    assert ctx.progress().eta_s == -1.0
    ctx.set_total(1000)
    now[0] += 2.0
    ctx.add(scanned=200)
    assert (ctx.progress().rate, ctx.progress().eta_s) == (100.0, 8.0)
    now[0] += 1.0
    ctx.add(scanned=700)
    faster = ctx.progress()
    assert 100.0 < faster.rate < 700.0
    assert faster.eta_s == pytest.approx(100 / faster.rate)
    ctx.add(scanned=100)
    assert ctx.progress().eta_s == 0.0
    now[0] += 1.0
    assert ctx.final_progress().rate == 250.0
