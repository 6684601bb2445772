"""The benchmarks' arithmetic: spreads, ratios, verdicts, and the file that keeps a run."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench.bars import BARS, MIB, bar, is_met
from bench.results import (
    Answer,
    Figure,
    Machine,
    Note,
    Run,
    Series,
    ratios,
    read_run,
    spread,
    write_run,
)
from bench.summary import amount, quoted, verdicts


def answer(*figures: Figure) -> Answer:
    return Answer("m", "q", 1.0, figures)


def test_a_spread_has_the_median_and_the_ends() -> None:
    found = spread((3.0, 1.0, 2.0, 10.0))
    assert (found.median, found.least, found.greatest, found.count) == (2.5, 1.0, 10.0, 4)
    with pytest.raises(ValueError, match="no values"):
        spread(())


def test_ratios_are_made_pair_by_pair() -> None:
    assert ratios((6.0, 8.0), (2.0, 4.0)) == (3.0, 2.0)
    with pytest.raises(ValueError, match="zip"):
        ratios((1.0,), (1.0, 2.0))


def test_every_bar_has_a_key_of_its_own_and_stands_in_the_table_unmeasured() -> None:
    assert len({bar.key for bar in BARS}) == len(BARS)
    found = verdicts([])
    assert [verdict.bar for verdict in found] == list(BARS)
    assert {verdict.met for verdict in found} == {None}
    assert "not measured" in found[0].line()


def test_a_bar_at_most_is_met_up_to_its_limit() -> None:
    most = bar("full/zstd")
    assert is_met(most, (1.15,), 1.15)
    assert not is_met(most, (1.16,), 1.16)


def test_a_bar_at_least_is_met_from_its_limit_on() -> None:
    least = bar("full/restic")
    assert is_met(least, (3.5,), 3.5)
    assert not is_met(least, (3.4,), 3.4)


def test_a_bar_that_is_judged_by_the_worst_is_missed_once() -> None:
    found = verdicts(
        [
            answer(Figure("memory/peak", (100.0 * MIB, 90.0 * MIB), "one")),
            answer(
                Figure("memory/peak", (129.0 * MIB,), "other"), Figure("full/zstd", (1.0, 9, 1))
            ),
        ]
    )
    met = {verdict.bar.key: verdict.met for verdict in found if verdict.values}
    assert met == {"memory/peak": False, "full/zstd": True}
    peak = next(verdict for verdict in found if verdict.bar.key == "memory/peak")
    assert len(peak.values) == 3
    assert peak.how == "one other"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"),
        (12.345, "s", "12.35 s"),
        (1010 * MIB, "B", "1010 MiB"),
        (1.5 * (1 << 40), "B", "1.5 TiB"),
        (7, "B", "7 B"),
        (150_000, "1/s", "150,000/s"),
        (1.1499, "×", "1.15 ×"),
    ],
)
def test_amounts_read_well(value: float, unit: str, text: str) -> None:
    assert amount(value, unit) == text  # type: ignore[arg-type]


def test_one_value_has_no_spread() -> None:
    assert quoted((2.0,), "×") == "2 ×"
    assert quoted((1.0, 2.0, 4.0), "×") == "2 × (1 × to 4 ×)"


def test_a_run_comes_back_from_its_file(tmp_path: Path) -> None:
    machine = Machine("a cpu", 2, 1 << 34, "6.1", "ext4", "3.11")
    results = (Series("w", "vmkeep", "s", (1.0, 2.0)), Figure("full/zstd", (1.0,)), Note("n"))
    answers = (Answer("m", "q", 3.0, results, "e"),)
    run = Run("abc", "2026-01-01", "quick", machine, {"borg": "1"}, 0.5, answers)
    path = tmp_path / "new" / "run.json"
    write_run(path, run)
    assert read_run(path) == run
    path.write_text("{}")
    with pytest.raises(msgspec.ValidationError):
        read_run(path)
