"""What every implementation of storage.view.tables.Tables promises, and that they agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import ViewDamaged
from storage.view.memory_tables import MemoryTables
from storage.view.tables import TABLE_NAMES, Table
from storage.view.view import View

Change = Callable[[Table], None]
KEYS = st.binary(min_size=1, max_size=6)


class MemoryRig:
    """Runs changes and questions on dictionaries."""

    def __init__(self, _directory: Path) -> None:
        self._tables = MemoryTables()

    def change(self, change: Change) -> None:
        change(self._tables.table("chunks"))

    ask = change


class LmdbRig:
    """Runs changes, committed one by one, and questions on LMDB."""

    def __init__(self, directory: Path) -> None:
        self._view = View(str(directory / "view"), b"contract")

    def change(self, change: Change) -> None:
        self._view.update(lambda tables: change(tables.table("chunks")))

    def ask(self, question: Change) -> None:
        with self._view.read() as tables:
            question(tables.table("chunks"))


Rig = MemoryRig | LmdbRig


@pytest.fixture(params=[MemoryRig, LmdbRig])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    made: Rig = request.param(tmp_path)
    return made


def fill(rig: Rig, *keys: bytes) -> None:
    for key in keys:
        rig.change(lambda table, key=key: table.put(key, b"v" + key))  # type: ignore[misc]


class TestTable:
    """One class for every implementation."""

    def test_what_was_put_is_got(self, rig: Rig) -> None:
        fill(rig, b"k")
        rig.change(lambda table: table.put(b"k", b"newer"))

        def ask(table: Table) -> None:
            assert table.get(b"k") == b"newer"
            assert table.get(b"absent") is None

        rig.ask(ask)

    def test_deleting_what_is_absent_is_no_error(self, rig: Rig) -> None:
        fill(rig, b"k")
        rig.change(lambda table: table.delete(b"absent"))
        rig.change(lambda table: table.delete(b"k"))

        def ask(table: Table) -> None:
            assert table.get(b"k") is None

        rig.ask(ask)

    def test_get_many_gives_those_that_are_there(self, rig: Rig) -> None:
        fill(rig, b"a", b"b")

        def ask(table: Table) -> None:
            assert table.get_many([b"b", b"x", b"a"]) == {b"a": b"va", b"b": b"vb"}
            assert table.get_many([]) == {}

        rig.ask(ask)

    def test_a_scan_is_ascending_and_keeps_to_its_prefix(self, rig: Rig) -> None:
        fill(rig, b"b\xff", b"a", b"b", b"c", b"b\x00")

        def ask(table: Table) -> None:
            assert [key for key, _ in table.scan(b"b")] == [b"b", b"b\x00", b"b\xff"]
            assert [key for key, _ in table.scan()] == [b"a", b"b", b"b\x00", b"b\xff", b"c"]
            assert list(table.scan(b"x")) == []

        rig.ask(ask)

    def test_keys_from_starts_where_it_is_told(self, rig: Rig) -> None:
        fill(rig, b"a1", b"b1", b"b3", b"c1")

        def ask(table: Table) -> None:
            assert list(table.keys_from(b"b2", b"b")) == [b"b3"]
            assert list(table.keys_from(b"b1", b"")) == [b"b1", b"b3", b"c1"]
            assert list(table.keys_from(b"b4", b"b")) == []

        rig.ask(ask)


@given(st.lists(st.tuples(KEYS, st.one_of(st.none(), st.binary(max_size=3))), max_size=30))
@settings(max_examples=60, deadline=None)
def test_both_come_to_the_same_state(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[bytes, bytes | None]]
) -> None:
    directory = tmp_path_factory.mktemp("tables")
    memory, view = MemoryTables(), View(str(directory / "view"), b"contract")

    def apply(table: Table) -> None:
        for key, value in changes:
            if value is None:
                table.delete(key)
            else:
                table.put(key, value)

    apply(memory.table("chunks"))
    view.update(lambda tables: apply(tables.table("chunks")))
    with view.read() as tables:
        for name in TABLE_NAMES:
            if name != "meta":
                assert list(tables.table(name).scan()) == list(memory.table(name).scan())
    view.close()


class TestAddMany:
    """New rows at once: in any place, or behind all others; in a table with groups, too."""

    @pytest.mark.parametrize("at_end", [False, True])
    @pytest.mark.parametrize("name", ["chunks", "pages"])
    def test_they_are_as_if_put_one_by_one(self, tmp_path: Path, name: str, at_end: bool) -> None:
        rows = [(bytes(7) + bytes([group, at]), bytes([at])) for group in (1, 2) for at in range(3)]
        if not at_end:
            rows = rows[::2]
        view, memory = View(str(tmp_path / "view"), b"contract"), MemoryTables()
        for state in (view.update, lambda change: change(memory)):
            state(lambda tables: tables.table(name).put(bytes(7) + b"\1", b"first"))
            state(lambda tables: tables.table(name).add_many(rows, at_end=at_end))
        with view.read() as tables:
            assert list(tables.table(name).scan()) == list(memory.table(name).scan())
        view.prove()
        view.close()

    @pytest.mark.parametrize(("keys", "at_end"), [([b"b"], False), ([b"c", b"a"], True)])
    def test_what_is_not_new_is_damage_and_changes_nothing(
        self, tmp_path: Path, keys: list[bytes], at_end: bool
    ) -> None:
        view = View(str(tmp_path / "view"), b"contract")
        view.update(lambda tables: tables.table("chunks").put(b"b", b"row"))
        with pytest.raises(ViewDamaged):
            view.update(
                lambda tables: tables.table("chunks").add_many(
                    [(key, b"other") for key in keys], at_end=at_end
                )
            )
        with view.read() as tables:
            assert dict(tables.table("chunks").scan()) == {b"b": b"row"}
        view.prove()
        view.close()
