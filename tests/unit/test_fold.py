"""The rules of the log, one by one, on dictionaries and without files."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import msgspec
import pytest

from storage.errors import AlreadyOnPoint, Damaged, NotOnPoint, Refused, SessionEnded
from storage.format.framing import encode_object
from storage.format.record import (
    HOLDS_LIMIT,
    MAGIC,
    Abort,
    BackupSeal,
    Checkpoint,
    Commit,
    DiskSeal,
    FileSeal,
    Forget,
    Op,
    Open,
    Rebase,
    Record,
    Retire,
    decode_record,
    encode_record,
    file_id,
    record_digest,
)
from storage.log.fold import Garbage, fold
from storage.view import tables
from storage.view.memory_tables import MemoryTables
from tests.store import new_uuid

A, B, C = (letter * 32 for letter in "abc")


class State:
    """A folded state that ops are applied to, a record each. A refused one leaves no trace."""

    def __init__(self) -> None:
        self.tables = MemoryTables()

    def apply(self, *ops: Op) -> Garbage:
        seq, previous = tables.applied(self.tables)
        record = Record(
            seq=seq + 1, previous=previous, nonce=secrets.token_bytes(16), host="h", ops=ops
        )
        after = self.tables.copy()
        garbage = fold(after, record, record_digest(encode_record(record)), None)
        self.tables = after
        return garbage

    def backup(
        self, session: str, name: str, disks: Sequence[str], parent: Sequence[str] = ()
    ) -> Garbage:
        """OPEN and COMMIT of a backup; `parent`: its uuid and its disks'."""
        self.apply(opened(session, holds=tuple(parent[:1])))
        seals = tuple(
            DiskSeal(disk=disk, capacity=100, manifest=n, parent=parent[1 + n] if parent else "")
            for n, disk in enumerate(disks)
        )
        return self.apply(
            Commit(
                session=session,
                packs=(sealed(0),),
                manifests=tuple(sealed(n) for n in range(len(disks))),
                backups=(
                    BackupSeal(
                        backup=name, label=b"", disks=seals, parent=parent[0] if parent else ""
                    ),
                ),
            )
        )


def opened(session: str, kind: str = "backup", holds: tuple[str, ...] = ()) -> Open:
    assert kind in ("backup", "gc", "read")
    return Open(session=session, kind=kind, host="h", incarnation="i", holds=holds)  # type: ignore[arg-type]


def sealed(n: int) -> FileSeal:
    return FileSeal(n=n, size_bytes=100, count=1, digest=bytes([n]) * 16)


@pytest.fixture
def state() -> State:
    return State()


def test_a_commit_needs_an_open_session(state: State) -> None:
    with pytest.raises(SessionEnded):
        state.apply(Commit(session=A))


def test_a_session_has_one_outcome(state: State) -> None:
    state.apply(opened(A))
    state.apply(Abort(session=A))
    for again in (Commit(session=A), Abort(session=A), Retire(session=A)):
        with pytest.raises(SessionEnded):
            state.apply(again)


def test_an_open_session_is_not_opened_again(state: State) -> None:
    state.apply(opened(A))
    with pytest.raises(Refused, match="open already"):
        state.apply(opened(A))


def test_abort_names_the_session_whose_files_may_go(state: State) -> None:
    state.apply(opened(A))
    assert state.apply(Abort(session=A)).sessions == [A]


def test_a_backup_uuid_is_live_once(state: State) -> None:
    name = new_uuid()
    state.backup(A, name, [new_uuid()])
    with pytest.raises(AlreadyOnPoint):
        state.backup(B, name, [new_uuid()])


def test_a_disk_uuid_is_live_once(state: State) -> None:
    disk = new_uuid()
    state.backup(A, new_uuid(), [disk])
    with pytest.raises(AlreadyOnPoint):
        state.backup(B, new_uuid(), [disk])


def test_a_manifest_of_no_disk_is_refused(state: State) -> None:
    state.apply(opened(A))
    with pytest.raises(Refused, match="belong to no disk"):
        state.apply(Commit(session=A, manifests=(sealed(0),)))


def test_a_disk_without_its_manifest_is_refused(state: State) -> None:
    state.apply(opened(A))
    seal = DiskSeal(disk=new_uuid(), capacity=1, manifest=5)
    with pytest.raises(Refused, match="manifest 5"):
        state.apply(
            Commit(session=A, backups=(BackupSeal(backup=new_uuid(), label=b"", disks=(seal,)),))
        )


def test_a_pack_number_twice_is_refused(state: State) -> None:
    state.apply(opened(A))
    with pytest.raises(Refused, match="twice"):
        state.apply(Commit(session=A, packs=(sealed(0), sealed(0))))


def test_forget_twice_is_refused(state: State) -> None:
    name = new_uuid()
    state.backup(A, name, [new_uuid()])
    state.apply(Forget(backups=(name,)))
    with pytest.raises(NotOnPoint):
        state.apply(Forget(backups=(name,)))


def test_forget_is_all_or_nothing(state: State) -> None:
    name = new_uuid()
    state.backup(A, name, [new_uuid()])
    with pytest.raises(NotOnPoint):
        state.apply(Forget(backups=(name, new_uuid())))
    row = tables.backups.get(state.tables, name)
    assert row is not None
    assert not row.forgotten


def test_a_held_backup_is_hidden_but_released_only_by_its_last_holder(state: State) -> None:
    name = new_uuid()
    state.backup(A, name, [new_uuid()])
    state.apply(opened(B, "read", (name,)))
    state.apply(opened(C, "read", (name,)))
    assert not state.apply(Forget(backups=(name,))).manifests
    with pytest.raises(NotOnPoint):
        state.apply(opened("d" * 32, "read", (name,)))
    assert not state.apply(Commit(session=B)).manifests
    assert state.apply(Abort(session=C)).manifests == [file_id(A, 0)]
    assert tables.backups.get(state.tables, name) is None


def test_a_parent_that_is_forgotten_but_held_by_the_session_is_good(state: State) -> None:
    parent, disk, child, child_disk = (new_uuid() for _ in range(4))
    state.backup(A, parent, [disk])
    state.apply(opened(B, "backup", (parent,)))
    state.apply(Forget(backups=(parent,)))
    seal = DiskSeal(disk=child_disk, capacity=100, manifest=0, parent=disk)
    backup = BackupSeal(backup=child, label=b"", disks=(seal,), parent=parent)
    state.apply(Commit(session=B, manifests=(sealed(0),), backups=(backup,)))
    row = tables.disks.require(state.tables, child_disk)
    assert (row.parent, tables.backups.require(state.tables, child).parent) == ("", "")


def test_a_parent_that_is_gone_is_refused(state: State) -> None:
    parent, disk = new_uuid(), new_uuid()
    state.backup(A, parent, [disk])
    state.apply(opened(B))
    state.apply(Forget(backups=(parent,)))
    seal = DiskSeal(disk=new_uuid(), capacity=100, manifest=0, parent=disk)
    backup = BackupSeal(backup=new_uuid(), label=b"", disks=(seal,), parent=parent)
    with pytest.raises(NotOnPoint, match="parent"):
        state.apply(Commit(session=B, manifests=(sealed(0),), backups=(backup,)))


def test_a_parent_of_another_capacity_is_refused(state: State) -> None:
    parent, disk = new_uuid(), new_uuid()
    state.backup(A, parent, [disk])
    state.apply(opened(B))
    seal = DiskSeal(disk=new_uuid(), capacity=101, manifest=0, parent=disk)
    backup = BackupSeal(backup=new_uuid(), label=b"", disks=(seal,), parent=parent)
    with pytest.raises(Refused, match="capacity"):
        state.apply(Commit(session=B, manifests=(sealed(0),), backups=(backup,)))


def test_a_childs_manifest_keeps_its_forgotten_parents(state: State) -> None:
    parent, disk, child, child_disk = (new_uuid() for _ in range(4))
    state.backup(A, parent, [disk])
    state.backup(B, child, [child_disk], (parent, disk))
    assert state.apply(Forget(backups=(parent,))).manifests == []
    assert state.apply(Forget(backups=(child,))).manifests == [file_id(B, 0), file_id(A, 0)]
    assert list(tables.manifests.scan(state.tables)) == []


def test_retire_is_for_gc_sessions(state: State) -> None:
    state.apply(opened(A))
    with pytest.raises(Refused, match="no gc session"):
        state.apply(Retire(session=A))


def test_a_pack_is_retired_once(state: State) -> None:
    state.backup(A, new_uuid(), [new_uuid()])
    state.apply(opened(B, "gc"))
    assert state.apply(Retire(session=B, retired=(file_id(A, 0),))).packs == [file_id(A, 0)]
    state.apply(opened(C, "gc"))
    with pytest.raises(Refused, match="not live"):
        state.apply(Retire(session=C, retired=(file_id(A, 0),)))


def test_a_rebase_of_what_has_changed_since_is_refused(state: State) -> None:
    parent, disk, child, child_disk = (new_uuid() for _ in range(4))
    state.backup(A, parent, [disk])
    state.backup(B, child, [child_disk], (parent, disk))
    state.apply(opened(C, "gc"))
    stale = Rebase(disk=child_disk, manifest=0, was=file_id(B, 0), parent=disk)
    state.apply(Forget(backups=(parent,)))
    with pytest.raises(Refused, match="changed since"):
        state.apply(Retire(session=C, manifests=(sealed(0),), rebased=(stale,)))


def test_a_rebase_replaces_the_disks_own_chain(state: State) -> None:
    parent, disk, child, child_disk = (new_uuid() for _ in range(4))
    state.backup(A, parent, [disk])
    state.backup(B, child, [child_disk], (parent, disk))
    state.apply(Forget(backups=(parent,)))
    state.apply(opened(C, "gc"))
    rebase = Rebase(disk=child_disk, manifest=0, was=file_id(B, 0))
    garbage = state.apply(Retire(session=C, manifests=(sealed(0),), rebased=(rebase,)))
    assert garbage.manifests == [file_id(B, 0), file_id(A, 0)]
    assert [name for name, _ in tables.manifests.scan(state.tables)] == [file_id(C, 0)]


def test_a_rebase_finds_what_stands_on_the_disk_also_behind_those_that_have_gone(
    state: State,
) -> None:
    """Grandchildren take over what their released parent stood on."""
    root, middle, *leaves = (new_uuid() for _ in range(5))
    disks = {name: new_uuid() for name in (root, middle, *leaves)}
    state.backup(A, root, [disks[root]])
    state.backup(B, middle, [disks[middle]], (root, disks[root]))
    for number, leaf in enumerate(leaves):
        base = root if number == 2 else middle
        state.backup(f"{number:032x}", leaf, [disks[leaf]], (base, disks[base]))
    state.apply(Forget(backups=(middle,)))
    state.apply(opened(C, "gc"))
    rebase = Rebase(disk=disks[root], manifest=0, was=file_id(A, 0))
    state.apply(Retire(session=C, manifests=(sealed(0),), rebased=(rebase,)))
    rows = dict(tables.manifests.scan(state.tables))
    assert file_id(A, 0) not in rows
    new, below = file_id(C, 0), file_id(B, 0)
    assert {name: (row.base, row.users) for name, row in rows.items()} == {
        new: ("", 3),
        below: (new, 2),
        file_id(f"{0:032x}", 0): (below, 1),
        file_id(f"{1:032x}", 0): (below, 1),
        file_id(f"{2:032x}", 0): (new, 1),
    }


def test_so_many_build_on_one_disk_and_no_more(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.log.fold.CHILDREN_LIMIT", 2)
    parent, disk = new_uuid(), new_uuid()
    state.backup(A, parent, [disk])
    for session in ("1" * 32, "2" * 32):
        state.backup(session, new_uuid(), [new_uuid()], (parent, disk))
    with pytest.raises(Refused, match="2 build on its parent already"):
        state.backup("3" * 32, new_uuid(), [new_uuid()], (parent, disk))


def test_what_sessions_hold_is_looked_up_once_for_all_that_is_forgotten(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each made a hostile log cost the square of its length."""
    names = [new_uuid() for _ in range(20)]
    for number, name in enumerate(names):
        state.backup(f"{number:032x}", name, [new_uuid()])
    looks = 0
    looked = tables.held_backups

    def counted(rows: tables.Tables) -> frozenset[str]:
        nonlocal looks
        looks += 1
        return looked(rows)

    monkeypatch.setattr(tables, "held_backups", counted)
    state.apply(Forget(backups=tuple(names)))
    assert looks == 1
    assert not list(tables.backups.scan(state.tables))


def test_a_session_that_holds_too_much_is_no_record() -> None:
    op = opened(A, holds=tuple(new_uuid() for _ in range(HOLDS_LIMIT + 1)))
    record = Record(seq=1, previous=bytes(32), nonce=bytes(16), host="h", ops=(op,))
    with pytest.raises(Refused):
        encode_record(record)
    with pytest.raises(Damaged):
        decode_record(encode_object(MAGIC, msgspec.msgpack.encode(record)), "r")


def test_a_checkpoint_of_the_future_is_refused(state: State) -> None:
    with pytest.raises(Refused):
        state.apply(Checkpoint(seq=1, digest=bytes(32), size_bytes=1))


def test_a_record_that_does_not_follow_is_damage(state: State) -> None:
    state.apply(opened(A))
    seq, previous = tables.applied(state.tables)
    for number, before in ((seq, previous), (seq + 2, previous), (seq + 1, bytes(32))):
        record = Record(seq=number, previous=before, nonce=bytes(16), host="h", ops=())
        with pytest.raises(Damaged):
            fold(state.tables, record, bytes(32), None)


def test_records_come_back_as_they_were() -> None:
    ops: tuple[Op, ...] = (
        opened(A, holds=(new_uuid(),)),
        Commit(
            session=A,
            packs=(sealed(1),),
            manifests=(sealed(0),),
            backups=(
                BackupSeal(
                    backup=new_uuid(),
                    label=b"\xff",
                    disks=(DiskSeal(disk=new_uuid(), capacity=7, manifest=0),),
                ),
            ),
        ),
        Abort(session=B),
        Forget(backups=(new_uuid(),)),
        Retire(session=C, retired=(file_id(A, 3),), rebased=()),
        Checkpoint(seq=3, digest=bytes(32), size_bytes=9),
    )
    record = Record(seq=7, previous=bytes(32), nonce=bytes(16), host="h", ops=ops)
    assert decode_record(encode_record(record), "r") == record


@pytest.mark.parametrize("session", ["../../etc", "A" * 32, "a" * 31, "a" * 33, ""])
def test_a_session_id_that_could_be_a_path_is_no_record(session: str) -> None:
    record = Record(
        seq=1, previous=bytes(32), nonce=bytes(16), host="h", ops=(Abort(session=session),)
    )
    body = msgspec.msgpack.encode(record)
    with pytest.raises(Damaged):
        decode_record(encode_object(MAGIC, body), "r")
    with pytest.raises(Refused):
        encode_record(record)
