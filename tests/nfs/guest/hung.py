"""Check in the VM: the NFS server is away in the middle of a backup by a real `vmkeep serve`."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.service import Service
from tests.nfs.guest import server
from tests.nfs.guest.ordinary import deep_check
from tests.nfs.guest.site import MIB, Site, until
from tests.rig import random_bytes

OUTAGE_AT_LEAST_S = 8.0
ANSWER_LIMIT_S = 8.0  # the emulated processor is ten times slower, a probe takes up to 5 s
UNREACHABLE = 50300
CONTENT_BYTES = 64 * MIB  # stored in seconds, so that the server's end falls in between
OPENED_AGAIN = 3  # records: OPEN and COMMIT of the first backup, OPEN of the second

Answer = dict[str, Any]


@dataclass(slots=True)
class Caller:
    """Calls over HTTP, each of which must answer in time. `slowest_s`: the longest so far."""

    url: str
    slowest_s: float = 0.0
    last_job: str = ""
    calls: list[str] = field(default_factory=list)

    def get(self, call: str, **query: str) -> Answer:
        return self._ask(f"/v1/{call}?{urllib.parse.urlencode(query)}", None)

    def post(self, call: str, **members: Any) -> Answer:
        return self._ask(f"/v1/{call}", json.dumps(members).encode())

    def data(self, call: str, **query: str) -> Any:
        """A GET's data."""
        return _data(self.get(call, **query))

    def made(self, call: str, **members: Any) -> Any:
        """A POST's data."""
        return _data(self.post(call, **members))

    def healthy(self) -> bool:
        return bool(self._ask("/healthz", None)["data"]["state"] == "ready")

    def _ask(self, path: str, body: bytes | None) -> Answer:
        began = time.monotonic()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_LIMIT_S) as response:
                self.last_job = response.headers.get("X-Job-Uuid", "")
                answer: Answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                answer = json.load(error)
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        self.calls.append(path.partition("?")[0])
        return answer


def _data(answer: Answer) -> Any:
    assert answer["scode"] == 0, answer
    return answer["data"]


@dataclass(frozen=True, slots=True)
class Serving:
    """A service with a VM, and one backup of it on the NFS point."""

    api: Caller
    data: Path
    ids: Mapping[str, str]

    def ask_backup(self, name: str) -> Answer:
        return self.api.post(
            "compute/backup/create",
            backup_point_uuid=self.ids["point"],
            compute_uuid=self.ids["vm"],
            backup_name=name,
            full_backup=True,
        )

    def begin_backup(self, name: str) -> tuple[str, str]:
        """(backup, job)."""
        backup = _data(self.ask_backup(name))["backup_uuid"]
        return backup, self.api.last_job

    def job(self, uuid: str) -> Answer:
        row = self.api.data("job/inspect", job_uuid=uuid)
        assert isinstance(row, dict)
        return row

    def point_state(self) -> str:
        row = self.api.data("backup_point/inspect", backup_point_uuid=self.ids["point"])
        return str(row["state"])

    def ended(self, job: str) -> Answer:
        until("the job ends", lambda: self.job(job)["state"] not in ("queued", "running"))
        return self.job(job)

    def restored(self, backup: str, name: str) -> bytes:
        """The content of a disk restored into a new volume of that name."""
        disk = {"target_device": "sda", "pool_uuid": self.ids["pool"], "volume_name": name}
        self.api.made(
            "compute/backup/restore",
            backup_uuid=backup,
            new_vm_name=name,
            restore_disks=[disk | {"usd_type": "SSD"}],
            object_group=self.ids["group"],
            zone_uuid=self.ids["zone"],
        )
        assert self.ended(self.api.last_job)["state"] == "succeeded"
        return (self.data / "pool" / name).read_bytes()


def _only(api: Caller, kind: str, member: str) -> str:
    (row,) = api.data(f"{kind}/list")["list"]
    return str(row[member])


def _prepare(api: Caller, site: Site, content: bytes) -> Serving:
    data = site.local / "data"
    (data / "pool" / "sda.raw").write_bytes(content)
    pool = _only(api, "pool", "pool_uuid")
    disk = {"target_device": "sda", "pool_uuid": pool, "volume_name": "sda.raw"}
    made = api.made("backup_point/create", name="nfs", kind="nfs", path=str(site.point))
    ids = {
        "pool": pool,
        "zone": _only(api, "zone", "uuid"),
        "group": _only(api, "object_group", "uuid"),
        "point": made["backup_point_uuid"],
        "vm": api.made("compute/create", compute_name="web", disks=[disk])["compute_uuid"],
    }
    return Serving(api, data, ids)


def server_away_during_a_backup(site: Site) -> None:
    """The backup waits and goes on; meanwhile everybody is answered, and told what is the matter.

    The server goes as soon as the backup's session is open on the point: it has seconds of work
    then, so what hangs is one of its writes, wherever that is.
    """
    config = site.local / "vmkeep.toml"
    config.write_text("[limits]\npoint_refresh_s = 1\nstalled_after_s = 2\n")
    content = random_bytes(CONTENT_BYTES, 1)
    with Service(site.local / "data", "--config", str(config), log=site.local / "log") as service:
        serving = _prepare(Caller(service.url), site, random_bytes(MIB, 2))
        first, job = serving.begin_backup("before")
        assert serving.ended(job)["state"] == "succeeded"
        (site.local / "data" / "pool" / "sda.raw").write_bytes(content)
        backup, job = serving.begin_backup("meanwhile")
        until("its session is open", lambda: len(_records(site.point)) == OPENED_AGAIN)
        began = time.monotonic()
        server.stop_serving()
        try:
            _while_it_hangs(site, serving, first, job)
            until("long enough", lambda: time.monotonic() - began > OUTAGE_AT_LEAST_S)
        finally:  # or the service, and with it this check, could never end
            server.start_serving()
        site.note(f"the server was away for {time.monotonic() - began:.1f} s")
        back = until("the point is back", lambda: serving.point_state() == "online")
        ended = serving.ended(job)
        assert (ended["state"], ended["stalled_s"]) == ("succeeded", 0)
        site.note(f"online {back:.1f} s after the server came back, then the backup ended well")
        assert serving.restored(backup, "copy") == content
        assert service.stop() == 0
    assert deep_check(site)["backups"] == 2


def _records(point: Path) -> list[Path]:
    return list(point.glob("domains/*/log/*/*"))


def _while_it_hangs(site: Site, serving: Serving, first: str, job: str) -> None:
    api, ids = serving.api, serving.ids
    api.slowest_s = 0.0
    took = until("it is seen", lambda: serving.point_state() == "unreachable")
    site.note(f"shown as unreachable after {took:.1f} s")
    took = until("the job is stalled", lambda: serving.job(job)["stalled_s"] > 0)
    before = serving.job(job)
    assert before["stalled_on"] == "backup point nfs"
    site.note(f"shown as stalled after {took:.1f} s more")
    assert api.healthy()
    (row,) = [row for row in api.data("backup_point/list")["list"] if row["name"] == "nfs"]
    assert row["state"] == "unreachable"
    assert "has not answered" in row["last_error"]
    listed = api.data("compute/backup/list", page_size="100")
    assert first in json.dumps(listed)
    assert api.data("compute/backup/inspect", backup_uuid=first)["uuid"] == first
    assert {row["state"] for row in api.data("job/list")["list"]} == {"running", "succeeded"}
    for call in ("compute", "pool", "cluster", "zone", "operation"):
        assert api.data(f"{call}/list")["list"]
    assert api.post("compute/backup/delete", backup_uuid=first)["scode"] == UNREACHABLE
    assert api.post("backup_point/gc", backup_point_uuid=ids["point"])["scode"] in (0, UNREACHABLE)
    now = serving.job(job)
    assert now["state"] == "running"
    assert now["progress"]["bytes_stored"] == before["progress"]["bytes_stored"]
    site.note(f"the job meanwhile: {now['progress']}")
    site.note(f"{len(api.calls)} calls, the slowest answer took {api.slowest_s:.2f} s")
