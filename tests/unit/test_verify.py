"""engine.points.verify: the checker's report as a job sees it."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from engine.errors import Cancelled
from engine.jobs.jobs import JobContext
from engine.points.verify import report_lines, run_verify
from storage.point import ClusterLabel
from tests.rig import Made, Rig, random_bytes

CHUNK = 64 << 10


def backup(rig: Rig, chunks: int) -> Made:
    path = rig.pool / "v"
    path.write_bytes(random_bytes(chunks * CHUNK))
    return rig.back_up(path)


def pack_bytes(rig: Rig) -> int:
    return sum(pack.stat().st_size for pack in rig.point_path.rglob("packs/*/*"))


def test_a_sound_point(rig: Rig) -> None:
    backup(rig, 20)
    context = JobContext()
    report = run_verify(str(rig.point_path), True, context)
    assert report.clean
    assert report_lines(report)[0].startswith("no findings in 1 backups, 1 packs, 20 chunks; ")
    progress = context.progress()
    assert progress.bytes_total == progress.bytes_scanned == pack_bytes(rig)


def test_progress_adds_up_over_domains(rig: Rig, tmp_path: Path) -> None:
    backup(rig, 20)
    first = rig.domain
    label = ClusterLabel(cluster_uuid=str(uuid.uuid4()), cluster_name="other")
    rig.domain = rig.point.domain(label, str(uuid.uuid4()), str(tmp_path / "views"))
    backup(rig, 20)
    backup(rig, 30)
    first.close()
    context = JobContext()
    run_verify(str(rig.point_path), True, context)
    progress = context.progress()
    assert progress.bytes_total == progress.bytes_scanned == pack_bytes(rig)


def test_a_shallow_check_counts_no_bytes(rig: Rig) -> None:
    backup(rig, 2)
    context = JobContext()
    assert run_verify(str(rig.point_path), False, context).clean
    assert context.progress().bytes_total == 0


def test_damage_is_named_with_place_and_backup(rig: Rig) -> None:
    made = backup(rig, 3)
    (pack,) = rig.point_path.rglob("packs/*/*")
    content = bytearray(pack.read_bytes())
    content[100_000] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(content)
    assert run_verify(str(rig.point_path), False, JobContext()).clean
    report = run_verify(str(rig.point_path), True, JobContext())
    assert not report.clean
    lines = report_lines(report)
    assert lines[0].startswith("1 finding in 1 backups")
    assert str(pack) in lines[1]
    assert made.backup in "".join(lines)


def test_a_cancelled_check_is_a_cancelled_job(rig: Rig) -> None:
    backup(rig, 2)
    context = JobContext()
    context.cancel(Cancelled("cancelled", "enough"))
    with pytest.raises(Cancelled):
        run_verify(str(rig.point_path), True, context)
