"""A damaged backup over HTTP: a verify finds it, a restore refuses, and gives what is left."""

from __future__ import annotations

from pathlib import Path

from storage.files.fs import OsFs
from storage.format.packs import read_footer
from tests.api_site import MIB, Site, serving


def damage_last_chunk(site: Site) -> str:
    """Flips a bit of the last chunk of the one pack; says where it is."""
    (pack,) = (site.root / "data" / "point").rglob("packs/*/*")
    entry = read_footer(OsFs(), str(pack))[1][-1]
    content = bytearray(pack.read_bytes())
    content[entry.offset + 100] ^= 4
    pack.chmod(0o600)
    pack.write_bytes(content)
    return f"{pack} at {entry.offset}"


async def test_what_is_left_of_a_backup(tmp_path: Path) -> None:
    async with serving(tmp_path) as site:
        vm = await site.make_vm()
        backup = await site.back_up(vm)
        place = damage_last_chunk(site)
        verify = await site.post(
            "backup_point/verify", {"backup_point_uuid": site.ids["point"], "deep": True}
        )
        job = verify.data["job_uuid"]
        assert (await site.ended(job)).state == "failed"
        told = (await site.get("job/inspect", job_uuid=job)).data["result"]
        assert any(place in line and backup in line for line in told), told
        assert any(f"of backup {backup}: {MIB} of {3 * MIB} bytes" in line for line in told), told

        refused = await site.post("compute/backup/restore", site.restore_body(backup))
        ended = await site.ended(refused.headers["X-Job-Uuid"])
        assert ended.state == "failed"
        assert place in ended.error

        disk = site.restore_disk(volume_name="left")
        body = site.restore_body(
            backup, new_vm_name="left", restore_disks=[disk], allow_damaged=True
        )
        allowed = await site.post("compute/backup/restore", body)
        assert (await site.ended(allowed.headers["X-Job-Uuid"])).state == "succeeded"
        row = await site.get("job/inspect", job_uuid=allowed.headers["X-Job-Uuid"])
        assert f"sda: missing offset={2 * MIB} length={MIB}" in row.data["result"]
        whole = (site.pool_path / "vm1-sda").read_bytes()
        assert (site.pool_path / "left").read_bytes() == whole[: 2 * MIB] + bytes(MIB)
