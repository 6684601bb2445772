"""storage.view.chunk_rows: the same answers, and the same table in the end, as without it."""

from __future__ import annotations

import random

import pytest

from storage.view import chunk_rows
from storage.view.chunk_rows import ChunkRows
from storage.view.memory_tables import MemoryTable


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_it_is_the_table_that_it_stands_for(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_rows, "MOST_KEPT_BACK", most)
    chance, behind, plain = random.Random(most), MemoryTable(), MemoryTable()
    rows = ChunkRows(behind)
    for _ in range(3000):
        key = bytes([chance.randrange(40)])
        act = chance.choice(("put", "put", "put many", "add many", "delete", "flush"))
        if act == "put":
            value = chance.randbytes(4)
            rows.put(key, value)
            plain.put(key, value)
        elif act.endswith("many"):
            some = {bytes([chance.randrange(40)]): chance.randbytes(4) for _ in range(4)}
            if act == "add many":
                for key in rows.get_many(list(some)):
                    del some[key]
                rows.add_many(some)
            else:
                rows.put_many(some)
            plain.rows.update(some)
        elif act == "delete":
            rows.delete(key)
            plain.delete(key)
        elif chance.random() < 0.1:
            rows.flush()
            assert behind.rows == plain.rows
        keys = [bytes([chance.randrange(40)]) for _ in range(5)]
        assert rows.get_many(keys) == plain.get_many(keys)
    rows.flush()
    assert behind.rows == plain.rows


def test_little_is_kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_rows, "MOST_KEPT_BACK", 10)
    behind = MemoryTable()
    rows = ChunkRows(behind)
    for number in range(25):
        rows.put(bytes([number]), b"row")
    assert len(behind.rows) == 20
