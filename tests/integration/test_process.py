"""The service as a process: one at a time, stopped, killed, and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from api.cli.follow import ENDED
from api.cli.names import pick_or_only, points, pools
from api.client import Client
from api.schemas import RowList
from api.schemas_backup import (
    BackupCreate,
    BackupCreated,
    BackupInspectQuery,
    BackupRecord,
    ComputeBackupBaseInfo,
)
from api.schemas_companion import (
    ClusterRow,
    ComputeCreate,
    ComputeCreated,
    ComputeInspectQuery,
    ComputeRow,
    JobQuery,
    JobRow,
    NewDiskMembers,
    PointRow,
    PoolRow,
)
from bench.service import SERVE, Service

MIB = 1 << 20
LONG_BYTES = 768 * MIB  # of noise: seconds of work for any machine
STOP_LIMIT_S = 10.0
PATIENCE_S = 60.0


def until(what: str, true: Callable[[], bool]) -> None:
    """Waits for something that another process does. Fails when it doesn't come."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


def make_vm(client: Client, data: Path, size_bytes: int) -> str:
    with (data / "pool" / "noise").open("wb") as file:
        for _ in range(size_bytes // MIB):
            file.write(os.urandom(MIB))
    disk = NewDiskMembers(
        target_device="sda", pool_uuid=pick_or_only(client, "pool", "", pools), volume_name="noise"
    )
    body = ComputeCreate(compute_name="noisy", disks=[disk])
    return client.post("compute/create", ComputeCreated, body).data.compute_uuid


def start_backup(client: Client, vm: str) -> tuple[str, str]:
    """The backup's and the job's uuid."""
    point = pick_or_only(client, "backup point", "", points)
    body = BackupCreate(backup_point_uuid=point, compute_uuid=vm, backup_name="b", full_backup=True)
    reply = client.post("compute/backup/create", BackupCreated, body)
    return reply.data.backup_uuid, reply.headers["X-Job-Uuid"]


def look(client: Client, job: str) -> JobRow:
    return client.get("job/inspect", JobRow, JobQuery(job_uuid=job)).data


def start_long_backup(client: Client, vm: str) -> tuple[str, str]:
    """As start_backup; on return it is well under way, with data on the point."""
    backup, job = start_backup(client, vm)
    until("data is stored", lambda: look(client, job).progress.bytes_stored > 8 * MIB)
    return backup, job


def assert_interrupted_and_usable(client: Client, vm: str, backup: str, job: str) -> None:
    """What was under way failed with a reason, the VM is free, and the next backup succeeds."""
    ended = look(client, job)
    assert ended.state == "failed"
    assert ended.error.startswith("interrupted")
    query = BackupInspectQuery(backup_uuid=backup)
    record = client.get("compute/backup/record", BackupRecord, query).data
    assert record.status == 2
    assert record.error.startswith("interrupted")
    machine = client.get("compute/inspect", ComputeRow, ComputeInspectQuery(compute_uuid=vm)).data
    assert machine.action == ""
    again, job = start_backup(client, vm)
    until("the next backup ends", lambda: look(client, job).state in ENDED)
    assert look(client, job).state == "succeeded"
    query = BackupInspectQuery(backup_uuid=again)
    assert client.get("compute/backup/inspect", ComputeBackupBaseInfo, query).data.status == 0


def test_a_second_service_on_the_same_data_is_refused(tmp_path: Path) -> None:
    with Service(tmp_path / "data") as service, Client(service.url) as client:
        second = subprocess.run(
            [*SERVE, "--data", str(tmp_path / "data"), "--listen", "127.0.0.1:0"],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
        assert second.returncode == 1
        message = second.stderr.splitlines()[-1]
        assert message == f"vmkeep: another process works on {tmp_path / 'data'}"
        assert client.get("pool/list", RowList[PoolRow]).data.rows, "the first one goes on"


def test_a_taken_port_is_refused(tmp_path: Path) -> None:
    with Service(tmp_path / "one") as service:
        address = service.url.removeprefix("http://")
        second = subprocess.run(
            [*SERVE, "--data", str(tmp_path / "two"), "--listen", address],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1].startswith(f"vmkeep: {address}: ")


@pytest.mark.parametrize("text", ["[limits]\nmax_jobs = 0", "[limit]\nmax_jobs = 1", "[[["])
def test_a_wrong_configuration_is_refused(tmp_path: Path, text: str) -> None:
    config = tmp_path / "vmkeep.toml"
    config.write_text(text)
    ran = subprocess.run(
        [*SERVE, "--data", str(tmp_path / "data"), "--config", str(config)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"vmkeep: {config}: ")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_service_stops_at_once(tmp_path: Path, stop: signal.Signals) -> None:
    with Service(tmp_path / "data") as service:
        began = time.monotonic()
        assert service.stop(stop) == 0
        assert time.monotonic() - began < STOP_LIMIT_S


def test_systemd_is_told_when_it_is_ready_and_when_it_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with Service(tmp_path / "data") as service:
            assert systemd.recv(100) == b"READY=1"
            service.stop()
            assert systemd.recv(100) == b"STOPPING=1"


def test_a_stop_ends_a_running_backup(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Service(data) as service, Client(service.url) as client:
        vm = make_vm(client, data, LONG_BYTES)
        backup, job = start_long_backup(client, vm)
        began = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - began < STOP_LIMIT_S
    with Service(data) as service, Client(service.url) as client:
        assert_interrupted_and_usable(client, vm, backup, job)


def test_a_kill_in_a_running_backup_leaves_nothing_hanging(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Service(data) as service, Client(service.url) as client:
        vm = make_vm(client, data, LONG_BYTES)
        backup, job = start_long_backup(client, vm)
        service.kill()
    with Service(data) as service, Client(service.url) as client:
        assert_interrupted_and_usable(client, vm, backup, job)
        rows = client.get("backup_point/list", RowList[PointRow]).data.rows
        packs = list((data / "point").rglob("packs/*/*"))
        assert len(packs) == rows[0].pack_count > 0, "no pack of the killed one is left"


def test_a_restart_keeps_what_was_made(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Service(data) as service, Client(service.url) as client:
        vm = make_vm(client, data, 4 * MIB)
        backup, job = start_backup(client, vm)
        until("the backup ends", lambda: look(client, job).state in ENDED)
        before = everything(client, vm, backup)
    with Service(data) as service, Client(service.url) as client:
        assert everything(client, vm, backup) == before


def everything(client: Client, vm: str, backup: str) -> list[object]:
    """What a caller may hold on to over a restart."""
    row = client.get("compute/inspect", ComputeRow, ComputeInspectQuery(compute_uuid=vm)).data
    query = BackupInspectQuery(backup_uuid=backup)
    return [
        client.get("cluster/list", RowList[ClusterRow]).data,
        [pool.pool_uuid for pool in client.get("pool/list", RowList[PoolRow]).data.rows],
        points(client),
        row,
        client.get("compute/backup/inspect", ComputeBackupBaseInfo, query).data,
    ]
