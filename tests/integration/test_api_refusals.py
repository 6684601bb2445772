"""Every bad input, its named error, and that nothing changed. The cases: tests/api_refusals.py."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest

from api.calls import Call, Reply
from api.decode import MAX_BODY_BYTES
from api.dispatch import answer
from api.errors import BY_NAME
from api.schemas import Empty, NoArguments
from engine.config import Config, Limits, PoolConfig
from engine.errors import ConfigInvalid, PoolUnreachable
from engine.service import Engine
from tests.api_refusals import UNKNOWN, attach
from tests.api_site import MIB, Site, serving, serving_gated
from tests.provoking import CASES, GATED, GatedCase, Refusal, Sent

NOT_BY_A_REQUEST = {
    "internal": "test_api_server: a defect of ours",
    "overloaded": "test_api_server: too many listeners; unit: workers",
    "shutting_down": "test_api_server: health while stopping",
    "engine_failed": "a root that is never raised itself",
    "storage_failed": "a root that is never raised itself",
    "cancelled": "an outcome of jobs: test_api_contract",
    "interrupted": "an outcome of jobs: tests of the engine",
    "volume_changed": "an outcome of jobs: tests of the data path",
    "disk_server_lost": "an outcome of jobs: tests/nbd",
    "disk_server_refused": "an outcome of jobs: tests/nbd",
    "disk_server_broken": "an outcome of jobs: tests/nbd",
    "managed_by_libvirt": "needs libvirt: tests/libvirt",
    "format_not_readable": "needs libvirt: tests/libvirt",
    "domain_stopped": "needs libvirt: tests/libvirt",
    "scratch_full": "needs libvirt: tests/libvirt",
    "domain_busy": "needs libvirt: tests/libvirt",
    "hypervisor_refused": "needs libvirt: tests/libvirt",
    "hypervisor_unreachable": "needs libvirt: tests/libvirt",
    "state_unreachable": "needs a disk that is silent: tests/fire",
    "chunk_missing": "handled inside a backup: tests of the data path",
    "refused": "a root of the log's refusals: tests of storage",
    "session_ended": "inside jobs: tests of storage",
    "backup_not_on_point": "answered as backup_not_found: tests of storage",
    "backup_already_on_point": "inside jobs: tests of storage",
    "point_not_ready": "while a point is being opened: tests of the engine",
    "point_unsafe_mount": "needs NFS: unit tests of mounts",
    "foreign_host": "of a service on loopback: test_api_process",
    "already_running": "before there is a server: test_api_process",
    "config_invalid": "before there is a server: test_api_process",
}
MOUNTED: set[str] = {"pool_full", "point_read_only"}
CONFIGURED: set[str] = {"point_full"}


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with serving(tmp_path) as made:
        yield made


def test_every_row_is_provoked_or_says_where() -> None:
    provoked = {case.row for case in CASES} | {row for row, _ in GATED} | MOUNTED | CONFIGURED
    assert provoked | NOT_BY_A_REQUEST.keys() == BY_NAME.keys()
    assert provoked & NOT_BY_A_REQUEST.keys() == set()


@pytest.mark.parametrize("refusal", CASES, ids=lambda one: f"{one.row}-{one.case.__name__}")
async def test_refused(site: Site, refusal: Refusal) -> None:
    request = await refusal.case(site)
    before = await site.shown()
    await _check(request, refusal.row, refusal.says)
    assert await site.shown() == before


@pytest.mark.parametrize(("row", "case"), GATED, ids=lambda one: getattr(one, "__name__", one))
async def test_refused_while_a_backup_runs(tmp_path: Path, row: str, case: GatedCase) -> None:
    async with serving_gated(tmp_path) as (site, gate):
        request = await case(site, gate)
        before = await site.shown()
        await _check(request, row)
        assert await site.shown() == before


async def _check(request: Sent, row: str, says: str = "") -> None:
    answer = await request
    assert answer.output["scode"] == BY_NAME[row].scode, answer.output
    assert answer.status == BY_NAME[row].status
    assert answer.output["message"] == BY_NAME[row].message
    assert answer.output["message_cn"] == BY_NAME[row].message_cn
    assert answer.output["desc"].startswith(says), answer.output
    assert answer.output["desc"]
    assert answer.output["stack"]


async def test_backup_to_a_full_point(tmp_path: Path) -> None:
    limits = Limits(point_reserve_bytes=1 << 60)
    async with serving(tmp_path, Config(limits=limits)) as site:
        vm = await site.make_vm()
        before = await site.shown()
        await _check(site.post("compute/backup/create", site.create_body(vm)), "point_full")
        assert await site.shown() == before


async def test_a_pools_directory_is_no_point_by_whatever_path(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "around" / "pool").mkdir(parents=True)
    pools = (
        PoolConfig("linked", str(tmp_path / "link")),
        PoolConfig("gone", "/no/such/place"),
        PoolConfig("inside", str(tmp_path / "around" / "pool")),
    )
    async with serving(tmp_path, Config(pools=pools)) as site:
        for path, place in (("real", "real"), ("link", "real"), ("around", "around")):
            refusal = attach(site, tmp_path / path)
            await _check(refusal, "invalid_member", f"path: {tmp_path}/{place} is the directory of")
        assert os.listdir(tmp_path / "real") == []


@pytest.mark.root
async def test_a_pools_directory_is_no_point_behind_a_bind_mount(
    tmp_path: Path, small_fs: Path
) -> None:
    (small_fs / "pool").mkdir()
    (tmp_path / "mounted").mkdir()
    mount = ["mount", "--bind", str(small_fs / "pool"), str(tmp_path / "mounted")]
    await asyncio.to_thread(subprocess.run, mount, check=True)
    try:
        pools = (PoolConfig("one", str(small_fs / "pool")),)
        async with serving(tmp_path, Config(pools=pools)) as site:
            refusal = attach(site, tmp_path / "mounted")
            await _check(refusal, "invalid_member", f"path: {tmp_path}/mounted is the directory of")
        both = (*pools, PoolConfig("two", str(tmp_path / "mounted")))
        with pytest.raises(ConfigInvalid, match=r"pool 'two': .*mounted is the directory of pool"):
            Engine.start(str(tmp_path / "data"), Config(pools=both))
    finally:
        umount = ["umount", str(tmp_path / "mounted")]
        await asyncio.to_thread(subprocess.run, umount, check=True)


@pytest.fixture
def small_fs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root (a mount)")
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.root
async def test_restore_into_a_pool_without_room(tmp_path: Path, small_fs: Path) -> None:
    big = tmp_path / "big"
    big.mkdir()
    pools = (PoolConfig("big", str(big)), PoolConfig("small", str(small_fs)))
    async with serving(tmp_path, Config(pools=pools)) as site:
        ids = {state.pool.name: state.pool.uuid for state in site.engine.pools()}
        site.pool_path, site.ids["pool"] = big, ids["big"]
        backup = await site.back_up(await site.make_vm({"sda": 12 * MIB}))
        disks = [site.restore_disk(pool_uuid=ids["small"])]
        before = await site.shown()
        body = site.restore_body(backup, restore_disks=disks)
        await _check(site.post("compute/backup/restore", body), "pool_full")
        assert await site.shown() == before
        assert os.listdir(small_fs) == []


@pytest.mark.root
async def test_backup_to_a_read_only_point(tmp_path: Path, small_fs: Path) -> None:
    config = Config(limits=Limits(point_reserve_bytes=0))
    async with serving(tmp_path, config) as site:
        point = (await attach(site, small_fs)).data["backup_point_uuid"]
        vm = await site.make_vm()
    remount = ["mount", "-o", "remount,ro", str(small_fs)]
    await asyncio.to_thread(subprocess.run, remount, check=True)
    async with serving(tmp_path, config) as site:
        before = await site.shown()
        request = site.post("compute/backup/create", site.create_body(vm, backup_point_uuid=point))
        await _check(request, "point_read_only")
        assert await site.shown() == before


# The operation log -------------------------------------------------------------------------------


async def test_refused_posts_are_logged_too(site: Site) -> None:
    vm = await site.make_vm()
    await site.post("compute/backup/create", site.create_body(UNKNOWN, vm_type="GDT"))
    await site.post("compute/backup/create", site.create_body(vm, backup_name=5))
    await site.post("compute/backup/create", b"{")
    await site.post("compute/backup/create", b" " * (MAX_BODY_BYTES + 1))
    logged = (await site.get("operation/list", page_size="4")).data
    assert logged["total_count"] == 5
    lines = [
        (row["who"], row["what"], row["target"], row["name"], row["vm_type"], row["scode"])
        for row in logged["list"]
    ]
    what = ("127.0.0.1", "compute/backup/create")
    assert lines == [
        (*what, "", "", "", 41300),
        (*what, "", "", "", 40000),
        (*what, vm, "", "", 40001),
        (*what, UNKNOWN, "test-api", "GDT", 40407),
    ]
    assert logged["list"][2]["desc"].startswith("backup_name: ")


async def test_an_error_with_a_path_that_is_not_unicode_is_logged(site: Site) -> None:
    def refused(_engine: Engine, _query: NoArguments) -> Reply[Empty]:
        raise PoolUnreachable(os.fsdecode(b"/srv/\xff: no answer"))

    call = Call(
        method="POST",
        path="/v1/odd",
        summary="",
        tag="",
        request=NoArguments,
        answer=Empty,
        run=refused,
    )
    answered = await asyncio.to_thread(partial(answer, site.engine, call, b"{}", "me"))
    assert answered.scode == 50302
    [row] = (await site.get("operation/list")).data["list"]
    assert (row["what"], row["desc"]) == ("odd", r"/srv/\udcff: no answer")
