"""Bad requests, by the row of api.errors that each provokes.

A case is a function that prepares a site and returns the request that has to be refused, not yet
sent. tests/integration/test_api_refusals.py sends them, and fails when a row has no case.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path

from yarl import URL

from api.decode import MAX_BODY_BYTES
from tests.api_site import MIB, Answer, Gate, Site, read_answer
from tests.forging import small_object
from tests.provoking import Sent, provokes, provokes_gated

UNKNOWN = "650ea11b-b7fb-4269-8232-aa53865aab3b"


# The request itself ------------------------------------------------------------------------------


@provokes("malformed")
async def broken_json(site: Site) -> Sent:
    return site.post("compute/backup/create", b'{"backup_name": ')


@provokes("malformed")
async def no_object(site: Site) -> Sent:
    return site.post("compute/backup/create", b"[1]")


@provokes("malformed")
async def lone_surrogate(site: Site) -> Sent:
    vm = await site.make_vm()
    return site.post("compute/backup/create", site.create_body(vm, backup_name="\ud800"))


@provokes("malformed")
async def deep_nesting(site: Site) -> Sent:
    return site.post("compute/backup/create", b'{"a":' * 100_000)


@provokes("malformed")
async def body_that_is_not_what_its_encoding_says(site: Site) -> Sent:
    headers = {"Content-Encoding": "gzip"}
    return site.post("compute/backup/create", b"no gzip", **headers)


@provokes("invalid_member", "backup_name: given twice")
async def duplicate_member(site: Site) -> Sent:
    return site.post("compute/backup/create", b'{"backup_name": "a", "backup_name": "b"}')


@provokes("invalid_member", "compute_uuid: missing")
async def missing_member(site: Site) -> Sent:
    body = site.create_body("x")
    del body["compute_uuid"]
    return site.post("compute/backup/create", body)


@provokes("invalid_member", "backup_name: missing or empty")
async def empty_member(site: Site) -> Sent:
    vm = await site.make_vm()
    return site.post("compute/backup/create", site.create_body(vm, backup_name=""))


@provokes("invalid_member", "full_backup: Expected `bool`")
async def wrong_type(site: Site) -> Sent:
    vm = await site.make_vm()
    return site.post("compute/backup/create", site.create_body(vm, full_backup="true"))


@provokes("invalid_member", "description: ")
async def oversized_member(site: Site) -> Sent:
    vm = await site.make_vm()
    return site.post("compute/backup/create", site.create_body(vm, description="x" * 4097))


@provokes("invalid_member", "tenant: ")
async def scope_value_with_nul(site: Site) -> Sent:
    return site.get("compute/backup/list", tenant="a\0b")


@provokes("invalid_member", "cluster_uuid: ")
async def scope_value_too_long(site: Site) -> Sent:
    return site.get("compute/backup/list", cluster_uuid="\U0001f600" * 400)


@provokes("invalid_member", "page_size: ")
async def page_size_too_large(site: Site) -> Sent:
    return site.get("compute/backup/list", page_size="1001")


@provokes("invalid_member", "backup_uuid: missing")
async def missing_parameter(site: Site) -> Sent:
    return site.get("compute/backup/inspect", backup_uuid="")


@provokes("invalid_member", "tenant: given twice")
async def duplicate_parameter(site: Site) -> Sent:
    return _raw(site, "GET", "/v1/compute/backup/list?tenant=a&tenant=a")


@provokes("body_too_large")
async def body_over_the_limit(site: Site) -> Sent:
    return site.post("compute/backup/create", b" " * (MAX_BODY_BYTES + 1))


@provokes("body_too_large")
async def compressed_body_over_the_limit(site: Site) -> Sent:
    headers = {"Content-Encoding": "gzip"}
    return site.post("compute/backup/create", gzip.compress(b" " * (16 * MIB)), **headers)


@provokes("route_not_found")
async def unknown_route(site: Site) -> Sent:
    return site.post("compute/backup/explode", {})


@provokes("route_not_found")
async def unknown_root(site: Site) -> Sent:
    return _raw(site, "GET", "/%00%ff/../<x>")


@provokes("method_not_allowed")
async def get_of_a_post(site: Site) -> Sent:
    return _raw(site, "GET", "/v1/compute/backup/create")


@provokes("method_not_allowed")
async def post_of_a_get(site: Site) -> Sent:
    return site.post("compute/backup/list", {})


@provokes("foreign_origin")
async def page_of_another_site(site: Site) -> Sent:
    vm = await site.make_vm()
    headers = {"Origin": "https://evil.example"}
    return site.post("compute/backup/create", site.create_body(vm), **headers)


@provokes("foreign_origin")
async def origin_that_is_no_address(site: Site) -> Sent:
    return site.post("compute/create", {"compute_name": "x", "disks": []}, Origin="http://[")


async def _raw(site: Site, method: str, target: str) -> Answer:
    url = URL(f"{site.url}{target}", encoded=True)
    async with site.http.request(method, url) as response:
        return await read_answer(response)


# Unknown uuids -----------------------------------------------------------------------------------


@provokes("cluster_not_found")
async def unknown_cluster(site: Site) -> Sent:
    return site.get("compute/backup/list", cluster_uuid=UNKNOWN)


@provokes("tenant_not_found")
async def unknown_tenant(site: Site) -> Sent:
    return site.get("compute/backup/list", tenant=UNKNOWN)


@provokes("namespace_not_found")
async def unknown_namespace(site: Site) -> Sent:
    return site.get("compute/backup/list", namespace_uuid=UNKNOWN)


@provokes("vm_not_found")
async def unknown_vm(site: Site) -> Sent:
    return site.post("compute/backup/create", site.create_body(UNKNOWN))


@provokes("vm_not_found")
async def unknown_vm_inspected(site: Site) -> Sent:
    return site.get("compute/inspect", compute_uuid="\U0001f600" * 64)


@provokes("vm_not_found")
async def unknown_vm_deleted(site: Site) -> Sent:
    return site.post("compute/delete", {"compute_uuid": UNKNOWN})


@provokes("vm_not_found")
async def unknown_vm_tracked(site: Site) -> Sent:
    return site.post("compute/track", {"compute_uuid": UNKNOWN})


@provokes("backup_not_found")
async def unknown_backup(site: Site) -> Sent:
    return site.get("compute/backup/inspect", backup_uuid=UNKNOWN)


@provokes("backup_not_found")
async def unknown_backup_deleted(site: Site) -> Sent:
    return site.post("compute/backup/delete", {"backup_uuid": UNKNOWN})


@provokes("backup_not_found")
async def unknown_backup_restored(site: Site) -> Sent:
    return site.post("compute/backup/restore", site.restore_body(UNKNOWN))


@provokes("backup_not_found")
async def import_of_what_is_not_on_the_point(site: Site) -> Sent:
    await site.back_up(await site.make_vm())
    entry = {"UUID": UNKNOWN, "BpUUID": site.ids["point"]}
    body = {"cluster_uuid": site.ids["cluster"], "backup": [entry]}
    return site.post("compute/backup/remote/import", body)


@provokes("backup_point_not_found")
async def unknown_point(site: Site) -> Sent:
    vm = await site.make_vm()
    return site.post("compute/backup/create", site.create_body(vm, backup_point_uuid=UNKNOWN))


@provokes("backup_point_not_found")
async def unknown_point_listed(site: Site) -> Sent:
    query = {"cluster_uuid": site.ids["cluster"], "backuppoint_uuid": UNKNOWN}
    return site.get("compute/backup/remote/list", **query)


@provokes("backup_point_not_found")
async def unknown_point_verified(site: Site) -> Sent:
    return site.post("backup_point/verify", {"backup_point_uuid": UNKNOWN})


@provokes("cluster_not_found")
async def unknown_cluster_of_a_remote_list(site: Site) -> Sent:
    query = {"cluster_uuid": UNKNOWN, "backuppoint_uuid": site.ids["point"]}
    return site.get("compute/backup/remote/list", **query)


@provokes("job_not_found")
async def unknown_job(site: Site) -> Sent:
    return site.post("job/cancel", {"job_uuid": UNKNOWN})


@provokes("zone_not_found")
async def unknown_zone(site: Site) -> Sent:
    backup = await site.back_up(await site.make_vm())
    return site.post("compute/backup/restore", site.restore_body(backup, zone_uuid=UNKNOWN))


@provokes("object_group_not_found")
async def unknown_object_group(site: Site) -> Sent:
    backup = await site.back_up(await site.make_vm())
    return site.post("compute/backup/restore", site.restore_body(backup, object_group=UNKNOWN))


@provokes("pool_not_found")
async def unknown_pool(site: Site) -> Sent:
    return await _restore_to(site, pool_uuid=UNKNOWN)


# What is named is there, but not like that -------------------------------------------------------


async def _restore_to(site: Site, **members: str) -> Sent:
    backup = await site.back_up(await site.make_vm())
    disks = [site.restore_disk(**members)]
    return site.post("compute/backup/restore", site.restore_body(backup, restore_disks=disks))


def _volume_name_case(name: str, label: str) -> None:
    async def case(site: Site) -> Sent:
        return await _restore_to(site, volume_name=name)

    case.__name__ = f"volume_name_{label}"
    provokes("invalid_member", "restore_disks[0].volume_name: " if label != "bytes" else "")(case)


_volume_name_case("a/b", "with_separator")
_volume_name_case("a\\b", "with_backslash")
_volume_name_case("/etc/x", "absolute")
_volume_name_case("..", "dots")
_volume_name_case("../x", "parent")
_volume_name_case(".hidden", "hidden")
_volume_name_case("a\0b", "nul")
_volume_name_case("a\nb", "line_end")
_volume_name_case("x" * 300, "too_long")
_volume_name_case("é" * 150, "bytes")


@provokes("disk_not_in_backup")
async def disk_that_the_backup_lacks(site: Site) -> Sent:
    return await _restore_to(site, target_device="sdz")


@provokes("usd_type_not_offered")
async def type_that_the_pool_lacks(site: Site) -> Sent:
    return await _restore_to(site, usd_type="NVME")


@provokes("name_taken")
async def vm_name_that_is_taken(site: Site) -> Sent:
    backup = await site.back_up(await site.make_vm())
    return site.post("compute/backup/restore", site.restore_body(backup, new_vm_name="vm1"))


@provokes("volume_in_use")
async def volume_that_is_there(site: Site) -> Sent:
    return await _restore_to(site, volume_name="vm1-sda")


@provokes("volume_in_use")
async def volume_that_is_there_without_a_vm(site: Site) -> Sent:
    (site.pool_path / "stray").write_bytes(b"x")
    return await _restore_to(site, volume_name="stray")


@provokes("invalid_member", "restore_disks: ")
async def same_volume_twice_in_one_request(site: Site) -> Sent:
    backup = await site.back_up(await site.make_vm({"sda": MIB, "sdb": MIB}))
    disks = [site.restore_disk(), site.restore_disk(target_device="sdb")]
    return site.post("compute/backup/restore", site.restore_body(backup, restore_disks=disks))


@provokes("invalid_member", "restore_disks: ")
async def same_disk_twice_in_one_request(site: Site) -> Sent:
    backup = await site.back_up(await site.make_vm())
    disks = [site.restore_disk(), site.restore_disk(volume_name="restore-2")]
    return site.post("compute/backup/restore", site.restore_body(backup, restore_disks=disks))


@provokes("invalid_member", "restore_disks: ")
async def restore_of_no_disk(site: Site) -> Sent:
    backup = await site.back_up(await site.make_vm())
    return site.post("compute/backup/restore", site.restore_body(backup, restore_disks=[]))


@provokes("vm_no_disks")
async def backup_of_a_vm_without_disks(site: Site) -> Sent:
    made = await site.post("compute/create", {"compute_name": "bare", "disks": []})
    return site.post("compute/backup/create", site.create_body(made.data["compute_uuid"]))


@provokes("name_taken")
async def second_vm_of_a_name(site: Site) -> Sent:
    await site.make_vm()
    return site.post("compute/create", {"compute_name": "vm1", "disks": []})


@provokes("invalid_member", "capacity: ")
async def new_volume_without_capacity(site: Site) -> Sent:
    disk = {"target_device": "sda", "pool_uuid": site.ids["pool"], "volume_name": "new"}
    return site.post("compute/create", {"compute_name": "x", "disks": [disk]})


@provokes("job_finished")
async def cancel_of_a_finished_job(site: Site) -> Sent:
    vm = await site.make_vm()
    created = await site.post("compute/backup/create", site.create_body(vm))
    job = created.headers["X-Job-Uuid"]
    await site.ended(job)
    return site.post("job/cancel", {"job_uuid": job})


@provokes("name_taken", "'vm1-sdb' in pool default is not a regular file")
async def delete_of_a_vm_with_a_directory_for_a_volume(site: Site) -> Sent:
    vm = await site.make_vm({"sda": MIB, "sdb": MIB})
    (site.pool_path / "vm1-sdb").unlink()
    (site.pool_path / "vm1-sdb").mkdir()
    return site.post("compute/delete", {"compute_uuid": vm, "delete_volumes": True})


@provokes_gated("vm_busy")
async def create_while_the_vm_is_backing_up(site: Site, gate: Gate) -> Sent:
    del gate
    vm = await site.make_vm()
    await site.post("compute/backup/create", site.create_body(vm))
    return site.post("compute/backup/create", site.create_body(vm))


@provokes_gated("vm_busy")
async def delete_of_a_vm_that_is_backing_up(site: Site, gate: Gate) -> Sent:
    del gate
    vm = await site.make_vm()
    await site.post("compute/backup/create", site.create_body(vm))
    return site.post("compute/delete", {"compute_uuid": vm, "delete_volumes": True})


@provokes_gated("backup_running")
async def delete_of_a_running_backup(site: Site, gate: Gate) -> Sent:
    del gate
    created = await site.post("compute/backup/create", site.create_body(await site.make_vm()))
    return site.post("compute/backup/delete", {"backup_uuid": created.data["backup_uuid"]})


@provokes_gated("backup_failed")
async def restore_of_a_running_backup(site: Site, gate: Gate) -> Sent:
    del gate
    created = await site.post("compute/backup/create", site.create_body(await site.make_vm()))
    return site.post("compute/backup/restore", site.restore_body(created.data["backup_uuid"]))


@provokes_gated("backup_failed")
async def restore_of_a_failed_backup(site: Site, gate: Gate) -> Sent:
    created = await site.post("compute/backup/create", site.create_body(await site.make_vm()))
    await site.post("job/cancel", {"job_uuid": created.headers["X-Job-Uuid"]})
    gate.open()
    await site.ended(created.headers["X-Job-Uuid"])
    return site.post("compute/backup/restore", site.restore_body(created.data["backup_uuid"]))


@provokes_gated("point_in_use")
async def detach_of_a_point_in_use(site: Site, gate: Gate) -> Sent:
    del gate
    await site.post("compute/backup/create", site.create_body(await site.make_vm()))
    return site.post("backup_point/delete", {"backup_point_uuid": site.ids["point"]})


# Points and pools --------------------------------------------------------------------------------


def attach(site: Site, path: Path, **members: str) -> Sent:
    body = {"name": "second", "kind": "local", "path": str(path)} | members
    return site.post("backup_point/create", body)


@provokes("point_not_empty")
async def point_path_that_is_no_point(site: Site) -> Sent:
    path = site.root / "full"
    path.mkdir()
    (path / "file").write_text("mine")
    return attach(site, path)


@provokes("point_newer_format")
async def point_of_a_newer_format(site: Site) -> Sent:
    path = site.root / "newer"
    path.mkdir()
    (path / "POINT").write_bytes(small_object(b"VKPO", b"whatever", version=2))
    return attach(site, path)


@provokes("data_damaged")
async def point_that_is_damaged(site: Site) -> Sent:
    path = site.root / "damaged"
    path.mkdir()
    (path / "POINT").write_bytes(small_object(b"VKPO", b"whatever")[:-1] + b"\0")
    return attach(site, path)


@provokes("point_unreachable")
async def point_path_that_is_not_there(site: Site) -> Sent:
    return attach(site, site.root / "nowhere")


@provokes("point_in_use")
async def point_that_is_attached_already(site: Site) -> Sent:
    return attach(site, Path(site.engine.points()[0].point.path))


@provokes("name_taken")
async def point_name_that_is_taken(site: Site) -> Sent:
    path = site.root / "empty"
    path.mkdir()
    return attach(site, path, name="default")


@provokes("invalid_member", "path: ")
async def point_path_that_is_relative(site: Site) -> Sent:
    return attach(site, Path("point"))


@provokes("invalid_member", "path: ")
async def point_path_with_nul(site: Site) -> Sent:
    return attach(site, Path("/srv/a\0b"))


@provokes("invalid_member", "kind: ")
async def point_of_an_unknown_kind(site: Site) -> Sent:
    return attach(site, site.root, kind="s3")


@provokes("point_unreachable")
async def backup_to_a_point_that_is_gone(site: Site) -> Sent:
    vm = await site.make_vm()
    path = site.engine.points()[0].point.path
    os.rename(path, f"{path}-elsewhere")
    return site.post("compute/backup/create", site.create_body(vm))


@provokes("pool_unreachable")
async def volume_in_a_pool_that_is_gone(site: Site) -> Sent:
    site.pool_path.rename(site.pool_path.with_name("elsewhere"))
    site.pool_path = site.pool_path.with_name("elsewhere")
    disk = {"target_device": "sda", "pool_uuid": site.ids["pool"], "volume_name": "new"}
    body = {"compute_name": "x", "disks": [disk | {"capacity": MIB}]}
    return site.post("compute/create", body)
