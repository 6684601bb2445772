"""Does the API answer in time while a backup runs, with many backups in the catalogue?

A real service; its domain gets 100,000 backups, which it takes in as another host's. Then, while
backups of a volume of random data run one after the other, a client asks for one thing after the
other: inspect, and list by every filter, new and far behind. The start of the service with all that
is timed as its child process, from its being made to its first answer.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from bench.lab import Lab
from bench.results import Figure, Note, Result, Series
from bench.runner import alone
from bench.service import Service
from bench.states import HastyFs, add_backups, call, vm_uuid
from storage.point import ClusterLabel, Point

QUESTION = "Does the API answer in time while a backup runs, and how soon after a start?"

SYNC_TIMEOUT_S = 300.0
OF_THESE = 500


class _Total(msgspec.Struct):
    total_count: int


class _Row(msgspec.Struct):
    uuid: str


class _Rows(msgspec.Struct):
    rows: list[_Row] = msgspec.field(name="list")


class _Places(msgspec.Struct):
    rows: list[dict[str, object]] = msgspec.field(name="list")


def run(lab: Lab) -> Iterator[Result]:
    count = lab.pick(10_000, 100_000)
    how = "" if lab.full else f"{count:,} backups"
    with lab.scratch() as root:
        data = root / "data"
        _fill(data, count)
        with Service(data) as service:
            _await_total(service.url, count)
            vm = _make_vm(service.url, lab.pick(256, 1024) << 20)
            for what, running in (("idle", False), ("while a backup runs", True)):
                took = _asked(service.url, vm, running)
                for name, values in took.items():
                    yield Series(f"{name}, {what}", "vmkeep", "s", tuple(values))
            every = sorted(value for values in took.values() for value in values)
            yield Figure("api/p99", (every[int(len(every) * 0.99)],), how)
            peak = service.peak_memory_bytes() >> 20
            yield Note(f"peak resident of the service that took them in: {peak} MiB")
        starts = []
        for _ in range(lab.repeats):
            began_s = time.perf_counter()
            with Service(data) as service:
                call(service.url, "/v1/compute/backup/list")
                starts.append(time.perf_counter() - began_s)
        yield Figure("start/time", tuple(starts), how)
        yield from _memory(data, count)


def _memory(data: Path, count: int) -> Iterator[Result]:
    """What a service holds that was started with all of them there, and has looked at its point."""
    with Service(data) as service:
        _await_total(service.url, count)
        service.await_rest()
        resident, own = service.memory_bytes()
        who = f"service with {count:,} backups"
        yield Series(f"{who}: resident, at rest", "vmkeep", "B", (float(resident),))
        yield Series(f"{who}: its own memory, at rest", "vmkeep", "B", (float(own),))
        yield Series(f"{who}: peak memory", "vmkeep", "B", (float(service.peak_memory_bytes()),))


def _fill(data: Path, count: int) -> None:
    """Lets a service make its data directory, then adds the backups as another host does."""
    with Service(data) as service:
        clusters = msgspec.json.decode(call(service.url, "/v1/cluster/list"), type=_Places).rows
        points = msgspec.json.decode(call(service.url, "/v1/backup_point/list"), type=_Places).rows
    label = ClusterLabel(
        cluster_uuid=str(clusters[0]["uuid"]), cluster_name=str(clusters[0]["name"])
    )
    path = str(points[0]["path"])
    domain = Point.open(path, fs=HastyFs()).domain(label, "bench", f"{path}/unused")
    add_backups(domain, count)
    domain.close()


def _await_total(url: str, count: int) -> None:
    deadline_s = time.monotonic() + SYNC_TIMEOUT_S
    total = 0
    while total < count:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{total} backups of {count} are listed")
        time.sleep(0.5)
        found = call(url, "/v1/compute/backup/list?page_size=1")
        total = msgspec.json.decode(found, type=_Total).total_count


def _make_vm(url: str, size_bytes: int) -> str:
    pools = msgspec.json.decode(call(url, "/v1/pool/list"), type=_Places).rows
    with Path(str(pools[0]["path"]), "bench.raw").open("wb") as volume:
        chance = random.Random(3)
        for _ in range(size_bytes >> 24):
            volume.write(chance.randbytes(8 << 20) + b"text " * ((8 << 20) // 5) + bytes(3))
    disk = {
        "target_device": "sda",
        "pool_uuid": str(pools[0]["pool_uuid"]),
        "volume_name": "bench.raw",
    }
    made = call(url, "/v1/compute/create", {"compute_name": "bench", "disks": [disk]})
    return str(msgspec.json.decode(made, type=dict[str, str])["compute_uuid"])


def _asked(url: str, vm: str, running: bool) -> dict[str, list[float]]:
    """Seconds of each call, by kind."""
    stop = threading.Event()
    busy = threading.Thread(target=_back_up, args=(url, vm, stop), daemon=True)
    if running:
        busy.start()
        time.sleep(0.5)
    chance = random.Random(4)
    rows = msgspec.json.decode(call(url, "/v1/compute/backup/list?page_size=1000"), type=_Rows).rows
    took: dict[str, list[float]] = {}
    for _ in range(OF_THESE):
        for name, path in _paths(chance, rows):
            began_s = time.perf_counter()
            call(url, path)
            took.setdefault(name, []).append(time.perf_counter() - began_s)
    stop.set()
    if running:
        busy.join()
    return took


def _paths(chance: random.Random, rows: list[_Row]) -> list[tuple[str, str]]:
    listed = "/v1/compute/backup/list?page_size=20"
    name, query = chance.choice(
        (
            ("list", ""),
            ("list", f"&page_number={chance.randrange(1, 400)}"),
            ("list", f"&filter_vm_uuid={vm_uuid(chance.randrange(1000))}"),
            ("list", f"&start_time=1700{chance.randrange(10**6):06}&end_time=1709000000"),
            ("list by a part of the name", f"&filter_backup_name={chance.randrange(10**4)}"),
        )
    )
    inspect = f"/v1/compute/backup/inspect?backup_uuid={chance.choice(rows).uuid}"
    return [("inspect", inspect), (name, listed + query)]


def _back_up(url: str, vm: str, stop: threading.Event) -> None:
    """One full backup after the other."""
    points = msgspec.json.decode(call(url, "/v1/backup_point/list"), type=_Places).rows
    body: dict[str, object] = {
        "compute_uuid": vm,
        "backup_name": "bench",
        "full_backup": True,
        "backup_point_uuid": str(points[0]["backup_point_uuid"]),
    }
    while not stop.is_set():
        call(url, "/v1/compute/backup/create", body)
        action = "backing_up"
        while action:
            time.sleep(0.2)
            found = call(url, f"/v1/compute/inspect?compute_uuid={vm}")
            action = str(msgspec.json.decode(found, type=dict[str, object])["action"])


if __name__ == "__main__":
    sys.exit(alone(__file__))
