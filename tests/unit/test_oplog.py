"""engine.oplog: bounded, newest first, kept over restarts."""

from __future__ import annotations

from pathlib import Path

from engine.oplog import MOST_TEXT_CHARS, OperationLog
from engine.state import State


def add(log: OperationLog, number: int) -> None:
    log.add("me", "compute/backup/create", f"t{number}", "", "GCD", 0, "")


def targets(log: OperationLog, page: int, size: int) -> list[str]:
    return [row.target for row in log.page(page, size)[0]]


def test_the_oldest_lines_go_and_pages_go_back(tmp_path: Path) -> None:
    state = State(str(tmp_path / "state"))
    log = OperationLog(state, lambda: 5.0, kept=10)
    assert log.page(1, 10) == ([], 0)
    for number in range(25):
        add(log, number)
    assert log.page(1, 4)[1] == 10
    assert targets(log, 1, 4) == ["t24", "t23", "t22", "t21"]
    assert targets(log, 3, 4) == ["t16", "t15"]
    assert targets(log, 4, 4) == []
    assert len(state.operations.values()) == 10
    again = OperationLog(state, lambda: 6.0, kept=5)
    add(again, 25)
    assert targets(again, 1, 100) == ["t25", "t24", "t23", "t22", "t21"]
    assert len(state.operations.values()) == 5
    state.close()


def test_long_texts_are_cut(tmp_path: Path) -> None:
    state = State(str(tmp_path / "state"))
    log = OperationLog(state, lambda: 5.0)
    log.add("me", "x", "y", "n" * 5000, "", 40001, "d" * MOST_TEXT_CHARS)
    (row,), _ = log.page(1, 1)
    assert (len(row.name), row.name[-1]) == (MOST_TEXT_CHARS, "…")
    assert row.desc == "d" * MOST_TEXT_CHARS
    assert (row.at, row.scode) == (5.0, 40001)
    state.close()
