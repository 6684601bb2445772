"""engine.inventory.inventory, seed, scopes, volumes, vms: what there is, and who may have it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from msgspec.structs import replace

from engine.config import Config, parse_config
from engine.errors import ConfigInvalid, Conflict, Invalid, NotFound, PoolUnreachable
from engine.inventory.inventory import EmbeddedInventory, Places
from engine.inventory.scopes import covers, landing, ranges
from engine.inventory.seed import settle_places, settle_vms
from engine.inventory.volumes import (
    make_volume,
    name_fault,
    remove_volume,
    volume_path,
    volume_size,
)
from engine.model import BackupPoint, Disk, Vm
from engine.probes import Probes
from engine.state import State
from engine.verb_types import Scope

THREE = b"""
[[clusters]]
name = "east"
[[clusters]]
name = "west"
uuid = "CCCCCCCC-0000-4000-8000-000000000000"
[[tenants]]
name = "default"
[[tenants]]
name = "acme"
[[namespaces]]
name = "first"
[[namespaces]]
name = "default"
[[namespaces]]
name = "prod"
tenant = "acme"
"""


def settled(state: State, tmp_path: Path, text: bytes = b"") -> Places:
    (tmp_path / "data" / "pool").mkdir(parents=True, exist_ok=True)
    data = str(tmp_path / "data")
    return settle_places(state, parse_config(text, "test"), data, f"{data}/pool", Probes())


def vm_of(places: Places, name: str, *volumes: str, share: bool = False) -> Vm:
    disks = tuple(
        Disk(
            target_device=f"sd{number}",
            pool_uuid=places.pools[0].uuid,
            volume_name=volume,
            capacity=1,
            usd_type="SSD",
            share=share,
        )
        for number, volume in enumerate(volumes)
    )
    return Vm(
        uuid=f"uuid-of-{name}",
        name=name,
        cluster_uuid=places.clusters[0].uuid,
        tenant=places.tenants[0].uuid,
        namespace=places.namespaces[0].uuid,
        zone_uuid=places.zones[0].uuid,
        object_group=places.object_groups[0].uuid,
        disks=disks,
    )


def test_uuids_are_made_once(state: State, tmp_path: Path) -> None:
    first = settled(state, tmp_path)
    assert settled(state, tmp_path) == first
    configured = settled(state, tmp_path, THREE)
    assert configured.clusters[1].uuid == "cccccccc-0000-4000-8000-000000000000"
    assert settled(state, tmp_path, THREE) == configured
    # The tenant kept its name, so it kept its uuid.
    assert configured.tenants[0] == first.tenants[0]
    assert first.clusters[0] not in configured.clusters
    # What was left out for a start is the same again.
    assert settled(state, tmp_path) == first
    assert settled(state, tmp_path, THREE) == configured


def test_a_name_has_the_uuid_that_it_had_last(state: State, tmp_path: Path) -> None:
    given = b'[[clusters]]\nname = "default"\nuuid = "00000000-0000-4000-8000-000000000000"'
    for uuid in ("a", "f"):  # of the keys before and after it
        configured = given.replace(b"00000000", uuid.encode() * 8)
        (cluster,) = settled(state, tmp_path, configured).clusters
        assert settled(state, tmp_path).clusters == (cluster,)


@pytest.mark.parametrize(
    "text",
    [
        b'[[clusters]]\nname = "a"\n[[clusters]]\nname = "a"',
        b'[[clusters]]\nname = "a"\nuuid = "nonsense"',
        b'[[namespaces]]\nname = "a"\ntenant = "nobody"',
        b'[[zones]]\nname = "a"\nuuid = "cccccccc-0000-4000-8000-000000000000"\n'
        b'[[zones]]\nname = "b"\nuuid = "CCCCCCCC-0000-4000-8000-000000000000"',
        b'[[pools]]\nname = "a"\npath = "/p"\n[[pools]]\nname = "b"\npath = "/x/../p/"',
        b'[[pools]]\nname = "a"\npath = "/p"\n[[points]]\nname = "b"\npath = "/p/"',
        b'[[points]]\nname = "a"\npath = "/p"\n[[points]]\nname = "b"\npath = "/p"',
        b'[[points]]\nname = "a"\npath = "/p"\n[[points]]\nname = "a"\npath = "/q"',
    ],
)
def test_a_configuration_that_contradicts_itself(state: State, tmp_path: Path, text: bytes) -> None:
    with pytest.raises(ConfigInvalid):
        settled(state, tmp_path, text)


@pytest.mark.parametrize("rival", ["pools", "points"])
def test_a_directory_is_one_things_by_whatever_path(
    state: State, tmp_path: Path, rival: str
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    text = f"""
        [[pools]]
        name = "a"
        path = "{tmp_path}/real"
        [[{rival}]]
        name = "b"
        path = "{tmp_path}/link"
        """
    with pytest.raises(ConfigInvalid, match=r"'b': .*/link is the directory of pool 'a'"):
        settled(state, tmp_path, text.encode())


def test_the_directory_of_an_attached_point_is_no_pools(state: State, tmp_path: Path) -> None:
    """Whether it is configured or not."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    state.points.put(BackupPoint(uuid="u", name="nas", kind="local", path=f"{tmp_path}/real"))
    text = f'[[pools]]\nname = "b"\npath = "{tmp_path}/link"\n'
    with pytest.raises(ConfigInvalid, match="is the directory of pool 'b'"):
        settled(state, tmp_path, text.encode())


@pytest.mark.parametrize("inside", ["", "/domains", "/domains/deep/down", "/none"])
def test_a_pool_in_a_backup_point_is_refused(state: State, tmp_path: Path, inside: str) -> None:
    """Its log and packs would be volumes, which a VM that has them can be deleted with."""
    (tmp_path / "nas" / "domains" / "deep" / "down").mkdir(parents=True)
    (tmp_path / "link").symlink_to("nas/domains")
    state.points.put(BackupPoint(uuid="u", name="nas", kind="local", path=f"{tmp_path}/nas"))
    for path in (f"nas{inside}", f"link/{inside.removeprefix('/domains')}"):
        text = f'[[pools]]\nname = "b"\npath = "{tmp_path}/{path}"\n'
        with pytest.raises(ConfigInvalid, match=r"'nas': .*/nas is the directory of pool 'b', or"):
            settled(state, tmp_path, text.encode())


def test_the_data_directory_holds_no_pool_but_its_own(state: State, tmp_path: Path) -> None:
    def configured(path: str) -> None:
        settled(state, tmp_path, f'[[pools]]\nname = "p"\npath = "{tmp_path}/{path}"'.encode())

    (tmp_path / "link").symlink_to("data")
    for path in ("data", "data/", "data/state", "data/none", "link", "link/views"):
        with pytest.raises(
            ConfigInvalid, match=r"data directory: .*/data is the directory of pool"
        ):
            configured(path)
    (tmp_path / "data" / "elsewhere").symlink_to(tmp_path)
    for path in ("data/pool", "data/pool/ssd", "link/pool", ".", "data/elsewhere", "database"):
        configured(path)
    (tmp_path / "data" / "pool").rmdir()
    configured("data/pool")


def test_configured_vms_keep_their_uuid_and_are_checked(state: State, tmp_path: Path) -> None:
    places = settled(state, tmp_path)
    text = '[[vms]]\nname = "m"\ndisks = [{target_device = "a", volume_name = "%s"}]\n'

    def config(volume: str) -> Config:
        return parse_config((text % volume).encode(), "test")

    settle_vms(state, config("m.raw"), places, volume_size)
    (first,) = state.vms.values()
    state.vms.put(replace(first, last_error="kept"))
    (tmp_path / "data" / "pool" / "n.raw").write_bytes(b"x" * 10)
    settle_vms(state, config("n.raw"), places, volume_size)
    (second,) = state.vms.values()
    assert (second.uuid, second.last_error) == (first.uuid, "kept")
    assert second.disks[0].capacity == 10
    for bad in ("../x", ".x", "a/b"):
        with pytest.raises(ConfigInvalid):
            settle_vms(state, config(bad), places, volume_size)
    other = parse_config((text % "n.raw").replace('"m"', '"o"').encode(), "test")
    with pytest.raises(ConfigInvalid, match=rf"belongs to VM m \({first.uuid}\); if this is"):
        settle_vms(state, other, places, volume_size)
    twice = parse_config(((text % "n.raw") + (text % "o.raw")).encode(), "test")
    with pytest.raises(ConfigInvalid, match="'m' is listed twice"):
        settle_vms(state, twice, places, volume_size)
    same = (text % "n.raw").replace('"m"', f'"o"\nuuid = "{first.uuid}"')
    settle_vms(state, parse_config(same.encode(), "test"), places, volume_size)
    assert [(vm.uuid, vm.name) for vm in state.vms.values()] == [(first.uuid, "o")]


def test_names_and_volumes_are_given_away_once(state: State, tmp_path: Path) -> None:
    places = settled(state, tmp_path)
    inventory = EmbeddedInventory(state, places)
    inventory.add_vm(vm_of(places, "a", "one", "two"))
    with pytest.raises(Conflict) as caught:
        inventory.add_vm(replace(vm_of(places, "a"), uuid="other"))
    assert caught.value.code == "name_taken"
    with pytest.raises(Conflict) as caught:
        inventory.add_vm(vm_of(places, "b", "two"))
    assert caught.value.code == "volume_in_use"
    inventory.add_vm(vm_of(places, "c", "shared", share=True))
    inventory.add_vm(vm_of(places, "d", "shared", share=True))
    inventory.remove_vm("uuid-of-a")
    inventory.add_vm(vm_of(places, "b", "two"))
    assert [vm.name for vm in inventory.vms()] == ["b", "c", "d"]


def test_one_of_many_gets_the_action(state: State, tmp_path: Path) -> None:
    places = settled(state, tmp_path)
    inventory = EmbeddedInventory(state, places)
    inventory.add_vm(vm_of(places, "a"))
    start, won, lost = threading.Barrier(8), list[Vm](), list[str]()

    def try_it() -> None:
        start.wait(10)
        try:
            won.append(inventory.begin_action("uuid-of-a", "backing_up"))
        except Conflict as error:
            lost.append(error.code)

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (len(won), lost) == (1, ["vm_busy"] * 7)
    with pytest.raises(Conflict):
        inventory.remove_vm("uuid-of-a")
    inventory.end_action("uuid-of-a", lambda vm: replace(vm, state="stopped", last_error="x"))
    assert inventory.vm("uuid-of-a").action == ""
    assert inventory.vm("uuid-of-a").last_error == "x"
    inventory.end_action("uuid-of-nobody")
    with pytest.raises(NotFound):
        inventory.begin_action("uuid-of-nobody", "restoring")


def test_actions_end_after_a_restart(state: State, tmp_path: Path) -> None:
    places = settled(state, tmp_path)
    inventory = EmbeddedInventory(state, places)
    for name in "abc":
        inventory.add_vm(vm_of(places, name))
    inventory.begin_action("uuid-of-b", "restoring")
    left = inventory.end_all_actions(lambda vm: replace(vm, state="restore_failed"))
    assert [vm.name for vm in left] == ["b"]
    assert [(vm.state, vm.action) for vm in inventory.vms()] == [
        ("stopped", ""),
        ("restore_failed", ""),
        ("stopped", ""),
    ]


def test_scopes(state: State, tmp_path: Path) -> None:
    places = settled(state, tmp_path, THREE)
    default, acme = places.tenants
    first, main, prod = places.namespaces

    def seen(**scope: object) -> list[tuple[str, str]]:
        made = Scope(**scope)  # type: ignore[arg-type]
        return [(cluster.name, namespace.name) for cluster, namespace in ranges(places, made)]

    east = places.clusters[0].uuid
    assert len(seen()) == 6
    assert seen(cluster_uuid=east.upper()) == [
        ("east", "first"),
        ("east", "default"),
        ("east", "prod"),
    ]
    assert seen(cluster_uuid=east, tenant=acme.uuid) == [("east", "prod")]
    assert seen(cluster_uuid=east, tenant=acme.uuid, multiple=True) == [("east", "prod")]
    assert seen(cluster_uuid=east, tenant=default.uuid) == [("east", "default")]
    assert len(seen(tenant=default.uuid, multiple=True)) == 6
    assert seen(cluster_uuid=east, namespace_uuid=first.uuid) == [("east", "first")]
    for bad in ({"cluster_uuid": "x"}, {"tenant": "x"}, {"namespace_uuid": "x"}):
        with pytest.raises(NotFound):
            seen(**bad)
    with pytest.raises(NotFound):
        seen(tenant=acme.uuid, namespace_uuid=main.uuid)
    assert covers(places, Scope(tenant=acme.uuid), east, prod.uuid)
    assert not covers(places, Scope(tenant=acme.uuid), east, first.uuid)
    assert covers(places, Scope(), east, "of a namespace that was configured once")
    assert landing(places, Scope())[1] == main
    assert landing(places, Scope(tenant=acme.uuid))[1] == prod


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".x",
        "a/b",
        "/a",
        "a\\b",
        "a\0",
        "a\n",
        "\x7f",
        "x" * 201,
        "é" * 101,
        "\ud800",
    ],
)
def test_names_that_are_not_plain(name: str) -> None:
    assert name_fault(name)


@pytest.mark.parametrize("name", ["a", "x" * 200, "é" * 100, "a b.raw", "-rf", "名.raw"])
def test_plain_names(name: str) -> None:
    assert name_fault(name) == ""


def test_volumes_are_plain_files_in_their_pool(state: State, tmp_path: Path) -> None:
    pool = settled(state, tmp_path).pools[0]
    assert volume_size(pool, "a.raw") is None
    make_volume(pool, "a.raw", 1 << 30)
    assert volume_size(pool, "a.raw") == 1 << 30
    assert Path(volume_path(pool, "a.raw")).stat().st_blocks == 0
    with pytest.raises(Conflict):
        make_volume(pool, "a.raw", 1)
    with pytest.raises(Invalid):
        make_volume(pool, "huge.raw", 1 << 60)
    assert volume_size(pool, "huge.raw") is None
    Path(pool.path, "link").symlink_to("/etc/passwd")
    Path(pool.path, "dir").mkdir()
    for name in ("link", "dir"):
        with pytest.raises(Conflict):
            volume_size(pool, name)
    remove_volume(pool, "a.raw")
    remove_volume(pool, "a.raw")
    assert volume_size(pool, "a.raw") is None
    gone = replace(pool, path=f"{pool.path}/none")
    with pytest.raises(PoolUnreachable):
        volume_size(gone, "a.raw")
    with pytest.raises(PoolUnreachable):
        make_volume(gone, "a.raw", 1)
