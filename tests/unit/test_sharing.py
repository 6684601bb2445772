"""engine.catalogue.sharing, and that the catalogue keeps little in memory and all of it in the
state."""

from __future__ import annotations

import tracemalloc

import msgspec
from msgspec.structs import replace

from engine.catalogue.catalogue import Catalogue
from engine.catalogue.sharing import Sharing, without_machine
from engine.model import Backup, DiskBackup, Machine
from engine.state import State
from tests.unit.test_catalogue import row

MACHINE = Machine(xml=bytes(20_000), nvram=bytes(500))
MOST_BYTES_PER_ROW = 1500


def full_row(number: int) -> Backup:
    """Decoded, as rows come: no two share anything."""
    disk = DiskBackup(target_device="sda", disk_uuid=f"{number:036}", capacity=1 << 30)
    plain = row(f"{number:036}", number, description="made by plan " * 5)
    label = replace(plain.label, disks=(disk,), machine=MACHINE, notes=("snapshot: reflink",))
    made = replace(plain, label=label, parent=f"{number - 1:036}", seq=number + 1)
    return msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=Backup)


def test_rows_are_equal_and_share_what_they_say_alike() -> None:
    sharing = Sharing(most=1000)
    rows = [full_row(number) for number in range(3)]
    shared = [sharing.of(one) for one in rows]
    assert shared == [without_machine(one) for one in rows]
    first, second = shared[0], shared[1]
    assert first.cluster_uuid is second.cluster_uuid
    assert first.label.vm_uuid is second.label.vm_uuid
    assert first.label.description is second.label.description
    assert first.label.notes is second.label.notes
    assert first.label.disks[0].target_device is second.label.disks[0].target_device
    assert second.parent is first.uuid


def test_what_it_knows_is_bounded() -> None:
    sharing = Sharing(most=10)
    rows = [full_row(number) for number in range(100)]
    assert [sharing.of(one) for one in rows] == [without_machine(one) for one in rows]
    assert len(sharing._texts) + len(sharing._notes) < 40


def test_the_machine_is_in_the_state_and_not_in_memory(state: State) -> None:
    catalogue = Catalogue(state)
    made = full_row(1)
    catalogue.put(made)
    for now in (catalogue, Catalogue(state)):
        known = now.get(made.uuid)
        assert known == without_machine(made)
        assert now.whole(known) == made
    assert state.backups.values() == [made]
    catalogue.remove(made)
    assert catalogue.whole(known) == known  # it went meanwhile


def test_a_row_that_differs_in_nothing_is_no_news(state: State) -> None:
    """Else each start would write all of them again: those in memory have no machine."""
    catalogue = Catalogue(state)
    made = full_row(1)
    catalogue.put(made)
    known = catalogue.get(made.uuid)
    assert catalogue.sync("c", "p", [made.uuid], lambda: [made])
    assert catalogue.get(made.uuid) is known
    renamed = replace(made, label=replace(made.label, name="other"))
    assert catalogue.sync("c", "p", [made.uuid], lambda: [renamed])
    assert catalogue.get(made.uuid).label.name == "other"
    assert catalogue.whole(known) == renamed


def test_memory_per_backup(state: State) -> None:
    count = 2000
    with state.store.write() as txn:
        for number in range(count):
            state.backups.put_in(txn, full_row(number))
    tracemalloc.start()
    try:
        catalogue = Catalogue(state)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert catalogue.count("p") == count
    assert used < count * MOST_BYTES_PER_ROW
