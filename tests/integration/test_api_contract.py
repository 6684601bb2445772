"""Every call of the contract (api/schemas.py), as its examples show it, member by member."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.api_site import MIB, Site, serving, serving_gated
from tests.forging import small_object

UNKNOWN = "650ea11b-b7fb-4269-8232-aa53865aab3b"
BASE_INFO = [
    "tenant",
    "tenant_name",
    "cluster_uuid",
    "cluster_name",
    "cluster_mode",
    "namespace",
    "uuid",
    "compute_uuid",
    "compute_name",
    "backup_point_uuid",
    "backup_point_name",
    "name",
    "description",
    "create_time",
    "status",
    "disks",
]
REMOTE = [
    "UUID",
    "NsUUID",
    "VmUUID",
    "BpUUID",
    "Name",
    "Desc",
    "Ctime",
    "DiskBackups",
    "Status",
    "Filename",
    "ExpiredTime",
    "cluster_uuid",
    "cluster_name",
    "cluster_mode",
]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with serving(tmp_path) as made:
        yield made


def _typed(row: dict[str, Any]) -> dict[str, type]:
    return {name: type(value) for name, value in row.items()}


async def test_list_example_of_an_empty_cluster(site: Site) -> None:
    answer = await site.get(
        "compute/backup/list",
        cluster_uuid=site.ids["cluster"],
        tenant=site.ids["tenant"],
        filter_vm_uuid="b6b0e5b9-dacd-432b-9b83-c3e89799009d",
        filter_backup_name="",
        filter_backup_description="",
        start_time="0",
        end_time="0",
        page_num="0",
        page_size="10",
    )
    assert answer.data == {
        "list": [],
        "total_count": 0,
        "each_range_list_state": [
            {
                "cluster_uuid": site.ids["cluster"],
                "cluster_name": "default",
                "namespace_uuid": site.ids["namespace"],
                "result": {
                    "scode": 0,
                    "desc": "",
                    "message": "success",
                    "message_cn": "成功",
                    "stack": None,
                    "data": "",
                },
                "total_count": 0,
            }
        ],
    }


async def test_create_example_then_inspect_and_list(site: Site) -> None:
    vm = await site.make_vm()
    before = int(time.time())
    answer = await site.post("compute/backup/create", site.create_body(vm))
    assert list(answer.data) == ["backup_uuid"]
    backup = answer.data["backup_uuid"]
    await site.ended(answer.headers["X-Job-Uuid"])

    row = (
        await site.get(
            "compute/backup/inspect",
            cluster_uuid=site.ids["cluster"],
            tenant=site.ids["tenant"],
            backup_uuid=backup,
        )
    ).data
    assert list(row) == BASE_INFO
    assert before <= row.pop("create_time") <= time.time()
    disk = row["disks"][0]
    assert len(disk.pop("backup_uuid")) == 36
    assert row == {
        "tenant": site.ids["tenant"],
        "tenant_name": "default",
        "cluster_uuid": site.ids["cluster"],
        "cluster_name": "default",
        "cluster_mode": site.engine.clusters()[0].mode,
        "namespace": site.ids["namespace"],
        "uuid": backup,
        "compute_uuid": vm,
        "compute_name": "vm1",
        "backup_point_uuid": site.ids["point"],
        "backup_point_name": "default",
        "name": "test-api",
        "description": "",
        "status": 0,
        "disks": [{"target_device": "sda", "capacity": 3 * MIB, "replica": 1, "share": False}],
    }
    listed = (await site.get("compute/backup/list")).data
    assert listed["total_count"] == 1
    assert list(listed["list"][0]) == BASE_INFO
    assert listed["each_range_list_state"][0]["total_count"] == 1


async def test_restore_example_unknown_members_included(site: Site) -> None:
    vm = await site.make_vm()
    backup = await site.back_up(vm)
    answer = await site.post("compute/backup/restore", site.restore_body(backup))
    assert answer.data == {}
    job = await site.ended(answer.headers["X-Job-Uuid"])
    assert job.state == "succeeded", job
    restored = (
        await site.get("compute/inspect", compute_uuid=answer.headers["X-Compute-Uuid"])
    ).data
    assert restored["compute_name"] == "test-restore"
    assert (restored["action"], restored["last_error"]) == ("", "")
    original = (site.pool_path / "vm1-sda").read_bytes()
    assert (site.pool_path / "restore-1").read_bytes() == original
    assert Path(restored["disks"][0]["path"]) == site.pool_path / "restore-1"


async def test_delete_example(site: Site) -> None:
    backup = await site.back_up(await site.make_vm())
    body = {
        "cluster_uuid": site.ids["cluster"],
        "tenant": site.ids["tenant"],
        "compute_uuid": "b6b0e5b9-dacd-432b-9b83-c3e89799009d",
        "backup_uuid": backup,
        "backup_name": "test-api",
    }
    assert (await site.post("compute/backup/delete", body)).data == {}
    assert (await site.get("compute/backup/list")).data["total_count"] == 0


@pytest.mark.parametrize("spelling", ["backuppoint_uuid", "backup_point_uuid"])
async def test_remote_list(site: Site, spelling: str) -> None:
    vm = await site.make_vm({"sda": MIB, "sdb": 2 * MIB})
    backup = await site.back_up(vm, description="d")
    query = {"cluster_uuid": site.ids["cluster"], spelling: site.ids["point"]}
    found = (await site.get("compute/backup/remote/list", **query)).data
    assert list(found) == ["total_count", "backups", "vm_infos"]
    assert found["total_count"] == 1
    assert found["vm_infos"] == {vm: {"Name": "vm1"}}
    row = found["backups"][0]
    assert list(row) == REMOTE
    assert row["UUID"] == backup
    assert row["Filename"] == f"{site.ids['cluster']}/{backup}"
    assert (row["Status"], row["ExpiredTime"], row["Desc"]) == (0, 0, "d")
    assert set(row["DiskBackups"]) == {"sda", "sdb"}
    assert _typed(row["DiskBackups"]["sdb"]) == {
        "BackupUUID": str,
        "Capacity": int,
        "Replica": int,
        "VolSnapUUID": str,
        "share": bool,
    }


async def test_remote_list_names_what_it_could_not_read(site: Site) -> None:
    """In a header, since `data` is as the document has it."""
    backup = await site.back_up(await site.make_vm())
    query = {"cluster_uuid": site.ids["cluster"], "backuppoint_uuid": site.ids["point"]}
    whole = await site.get("compute/backup/remote/list", **query)
    assert "X-Unread-Clusters" not in whole.headers
    domains = Path(site.engine.points()[0].point.path) / "domains"
    for number in range(100):
        stranger = domains / f"00000000-0000-4000-8000-{number:012}"
        stranger.mkdir()
        newer = small_object(b"VKDO", b"of tomorrow", version=2)
        (stranger / "DOMAIN").write_bytes(newer if number else b"no label")
    found = await site.get("compute/backup/remote/list", **query)
    assert [row["UUID"] for row in found.data["backups"]] == [backup]
    assert list(found.data) == list(whole.data)
    unread = found.headers["X-Unread-Clusters"].split(", ")
    assert unread[:2] == [
        "00000000-0000-4000-8000-000000000000 data_damaged",
        "00000000-0000-4000-8000-000000000001 point_newer_format",
    ]
    assert len(unread) == 64


async def test_remote_list_is_paged(site: Site) -> None:
    vm = await site.make_vm()
    made = [await site.back_up(vm, full_backup=False) for _ in range(3)]
    query = {"cluster_uuid": site.ids["cluster"], "backuppoint_uuid": site.ids["point"]}
    pages = [
        (
            await site.get("compute/backup/remote/list", **query, page_number=page, page_size="2")
        ).data
        for page in ("1", "2", "3")
    ]
    assert [page["total_count"] for page in pages] == [3, 3, 3]
    assert [len(page["backups"]) for page in pages] == [2, 1, 0]
    assert pages[2]["vm_infos"] == {}
    seen = [row["UUID"] for page in pages for row in page["backups"]]
    assert sorted(seen) == sorted(made)


async def test_import_of_another_installations_backup(site: Site, tmp_path: Path) -> None:
    vm = await site.make_vm()
    backup = await site.back_up(vm)
    path = site.engine.points()[0].point.path
    async with serving(tmp_path / "other") as other:
        attached = await other.post(
            "backup_point/create", {"name": "shared", "kind": "local", "path": path}
        )
        point = attached.data["backup_point_uuid"]
        assert point == site.ids["point"]
        query = {"cluster_uuid": other.ids["cluster"], "backuppoint_uuid": point}
        [found] = (await other.get("compute/backup/remote/list", **query)).data["backups"]
        assert found["cluster_uuid"] == site.ids["cluster"]
        body = {"cluster_uuid": other.ids["cluster"], "backup": [found | {"Name": "not read"}]}
        imported = (await other.post("compute/backup/remote/import", body)).data
        assert list(imported) == ["backups", "vm_infos"]
        assert list(imported["backups"][0]) == REMOTE
        assert imported["backups"][0]["cluster_uuid"] == other.ids["cluster"]
        assert imported["backups"][0]["Name"] == "test-api"
        assert imported["vm_infos"] == {vm: {"Name": "vm1"}}
        again = (await other.post("compute/backup/remote/import", body)).data
        assert again == imported
        row = (await other.get("compute/backup/inspect", backup_uuid=backup)).data
        assert row["cluster_uuid"] == other.ids["cluster"]
        assert row["namespace"] == other.ids["namespace"]


async def test_list_filters(site: Site) -> None:
    one, two = await site.make_vm(), await site.make_vm(seed=2)
    first = await site.back_up(one, backup_name="Alpha", description="weekly run")
    second = await site.back_up(two, backup_name="beta", description="")

    async def found(**query: str) -> set[str]:
        data = (await site.get("compute/backup/list", **query)).data
        assert data["total_count"] == len(data["list"])
        assert data["each_range_list_state"][0]["total_count"] == data["total_count"]
        return {row["uuid"] for row in data["list"]}

    assert await found(filter_vm_uuid=one) == {first}
    assert await found(filter_backup_name="lph") == {first}
    assert await found(filter_backup_name="alpha") == set()
    assert await found(filter_backup_description="ly r") == {first}
    assert await found(filter_backup_point_uuid=site.ids["point"]) == {first, second}
    assert await found(filter_backup_point_uuid=UNKNOWN) == set()
    assert await found(start_time=str(int(time.time()) + 1000)) == set()
    assert await found(end_time="1") == set()
    assert await found(end_time=str(int(time.time()) + 1000)) == {first, second}


async def test_pages_do_not_overlap(site: Site) -> None:
    vm = await site.make_vm()
    made = [await site.back_up(vm, full_backup=False) for _ in range(3)]
    seen = []
    for page in ("0", "2", "3"):
        data = (await site.get("compute/backup/list", page_num=page, page_size="1")).data
        assert data["total_count"] == 3
        seen += [row["uuid"] for row in data["list"]]
    assert sorted(seen) == sorted(made)


async def test_while_it_runs_status_is_1_and_the_vm_is_backing_up(tmp_path: Path) -> None:
    async with serving_gated(tmp_path) as (site, gate):
        vm = await site.make_vm()
        answer = await site.post("compute/backup/create", site.create_body(vm))
        backup = answer.data["backup_uuid"]
        row = (await site.get("compute/backup/inspect", backup_uuid=backup)).data
        assert (list(row), row["status"]) == (BASE_INFO, 1)
        assert (await site.get("compute/inspect", compute_uuid=vm)).data["action"] == "backing_up"
        gate.open()
        await site.ended(answer.headers["X-Job-Uuid"])
        row = (await site.get("compute/backup/inspect", backup_uuid=backup)).data
        assert row["status"] == 0
        assert (await site.get("compute/inspect", compute_uuid=vm)).data["action"] == ""


async def test_an_incremental_with_nothing_to_build_on_says_so(site: Site) -> None:
    vm = await site.make_vm()
    full = await site.back_up(vm, full_backup=False)
    record = (await site.get("compute/backup/record", backup_uuid=full)).data
    assert record["full_backup"] is True
    assert any("nothing to build on" in note for note in record["notes"])
    second = await site.back_up(vm, full_backup=False)
    record = (await site.get("compute/backup/record", backup_uuid=second)).data
    assert (record["full_backup"], record["parent_uuid"]) == (False, full)


async def test_a_failed_backup_has_status_2_and_keeps_its_reason(tmp_path: Path) -> None:
    async with serving_gated(tmp_path) as (site, gate):
        vm = await site.make_vm()
        answer = await site.post("compute/backup/create", site.create_body(vm))
        job = answer.headers["X-Job-Uuid"]
        assert (await site.post("job/cancel", {"job_uuid": job})).data == {}
        gate.open()
        assert (await site.ended(job)).state == "cancelled"
        backup = answer.data["backup_uuid"]
        row = (await site.get("compute/backup/inspect", backup_uuid=backup)).data
        assert row["status"] == 2
        record = (await site.get("compute/backup/record", backup_uuid=backup)).data
        assert record["error"]
        refused = await site.post("compute/backup/restore", site.restore_body(backup))
        assert refused.output["scode"] == 40903
        deleted = await site.post("compute/backup/delete", {"backup_uuid": backup})
        assert deleted.data == {}
