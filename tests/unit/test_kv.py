"""storage.lmdb_env.kv: typed rows, all or nothing, a map that grows."""

from __future__ import annotations

import threading
from pathlib import Path

import lmdb
import msgspec
import pytest

from storage.errors import Damaged, PointUnreachable, Refused
from storage.lmdb_env.kv import Store, Table


class Sheep(msgspec.Struct, frozen=True):
    name: str
    wool: int = 0
    fleece: bytes = b""


SHEEP = Table("sheep", Sheep)
OTHERS = Table("others", Sheep)


def opened(path: Path, map_bytes: int = 1 << 20) -> Store:
    return Store(str(path / "state"), [SHEEP, OTHERS], map_bytes=map_bytes)


def names(store: Store, reverse: bool = False) -> list[str]:
    with store.read() as txn:
        return [key for key, _ in txn.rows(SHEEP, reverse=reverse)]


def test_rows_survive_reopening_and_tables_are_apart(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with store.write() as txn:
        txn.put(SHEEP, "a", Sheep("dolly", 3))
        assert txn.get(SHEEP, "a") == Sheep("dolly", 3)
    store.close()
    store = opened(tmp_path)
    with store.read() as txn:
        assert txn.get(SHEEP, "a") == Sheep("dolly", 3)
        assert txn.get(OTHERS, "a") is None
    with store.write() as txn:
        txn.delete(SHEEP, "a")
        txn.delete(SHEEP, "never there")
    assert names(store) == []
    store.close()


def test_it_is_open_once_by_whatever_path(tmp_path: Path) -> None:
    """Two that write, each with a lock table of its own, would destroy it."""
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "state").symlink_to(tmp_path / "state")
    store = opened(tmp_path)
    for path in (tmp_path, tmp_path / "link"):
        with pytest.raises(Refused, match="is in use already"):
            opened(path)
    with store.write() as txn:
        txn.put(SHEEP, "a", Sheep("dolly"))
    store.close()
    store = opened(tmp_path / "link")
    assert names(store) == ["a"]
    store.close()
    (tmp_path / "state" / "data.mdb").write_bytes(b"no database")
    for _ in range(2):  # who can't open it does not keep it
        with pytest.raises(Damaged):
            opened(tmp_path)


def test_an_exception_undoes_the_whole_block(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with store.write() as txn:
        txn.put(SHEEP, "a", Sheep("kept"))

    def fail() -> None:
        with store.write() as txn:
            txn.put(SHEEP, "b", Sheep("lost"))
            txn.delete(SHEEP, "a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(store) == ["a"]
    store.close()


def test_rows_come_in_order(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with store.write() as txn:
        for key in ("b", "d", "a", "c"):
            txn.put(SHEEP, key, Sheep(key))
    assert names(store) == ["a", "b", "c", "d"]
    assert names(store, reverse=True) == ["d", "c", "b", "a"]
    store.close()


def test_the_map_grows_and_loses_nothing_of_the_block(tmp_path: Path) -> None:
    store = opened(tmp_path, map_bytes=64 << 10)
    with store.write() as txn:
        txn.put(SHEEP, "first", Sheep("first"))
        for number in range(64):
            txn.put(SHEEP, f"big{number:02}", Sheep("big", fleece=bytes([number]) * 50_000))
        txn.delete(SHEEP, "big00")
        # Seen inside the block, too, though it was begun anew on the way.
        assert txn.get(SHEEP, "first") == Sheep("first")
    with store.read() as txn:
        kept = dict(txn.rows(SHEEP))
    assert len(kept) == 64
    assert kept["big63"].fleece == bytes([63]) * 50_000
    store.close()


def test_the_map_waits_for_readers_before_it_grows(tmp_path: Path) -> None:
    store = opened(tmp_path, map_bytes=64 << 10)
    inside, leave, seen = threading.Event(), threading.Event(), []

    def read() -> None:
        with store.read() as txn:
            inside.set()
            leave.wait(10)
            seen.append(txn.get(SHEEP, "big"))

    def write() -> None:
        with store.write() as txn:
            txn.put(SHEEP, "big", Sheep("big", fleece=bytes(1 << 20)))

    reader, writer = threading.Thread(target=read), threading.Thread(target=write)
    reader.start()
    assert inside.wait(10)
    writer.start()
    leave.set()
    reader.join(10)
    writer.join(10)
    assert seen == [None]
    assert names(store) == ["big"]
    store.close()


def test_what_was_read_is_let_go_and_is_there_still(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with store.write() as txn:
        for number in range(100):
            txn.put(SHEEP, f"{number:03}", Sheep("dolly", fleece=bytes(3000)))
    with store.read() as txn:
        first = txn.get(SHEEP, "000")
        store.release_memory()  # nothing, as somebody reads
        assert txn.get(SHEEP, "000") == first
    store.release_memory()
    assert len(names(store)) == 100
    with store.write() as txn:
        txn.put(SHEEP, "100", Sheep("molly"))
    store.release_memory()
    assert len(names(store)) == 101
    store.close()
    store.release_memory()


def test_keys_that_cannot_be_are_not_there(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for key in ("", "k" * 512, "\ud800"):
        with store.read() as txn:
            assert txn.get(SHEEP, key) is None
    with pytest.raises(ValueError, match="no key"), store.write() as txn:
        txn.put(SHEEP, "", Sheep("nobody"))
    store.close()


def test_bytes_that_are_no_row_are_damage(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.close()
    (tmp_path / "state" / "data.mdb.seal").unlink()
    env = lmdb.open(str(tmp_path / "state"), max_dbs=2)
    with env.begin(write=True, db=env.open_db(b"sheep")) as txn:
        txn.put(b"a", b"\xc1 not msgpack")
    env.close()
    store = opened(tmp_path)
    with pytest.raises(Damaged, match="sheep"), store.read() as txn:
        txn.get(SHEEP, "a")
    store.close()


def test_a_closed_store_answers_with_an_error(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.close()
    with pytest.raises(PointUnreachable), store.read():
        pass
    with pytest.raises(PointUnreachable), store.write():
        pass


def test_writers_take_turns(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with store.write() as txn:
        txn.put(SHEEP, "count", Sheep("count"))

    def count() -> None:
        for _ in range(20):
            with store.write() as txn:
                before = txn.get(SHEEP, "count")
                assert before is not None
                txn.put(SHEEP, "count", Sheep("count", before.wool + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    with store.read() as found:
        assert found.get(SHEEP, "count") == Sheep("count", 80)
    store.close()
