"""The page that is made of a run, its plots, and the arithmetic of growth."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench.bars import BARS
from bench.growth import GIB, MIB, Fleet, Rates, cost, rates_of
from bench.plot import bars
from bench.report import write_report
from bench.results import Answer, Figure, Machine, Note, Result, Run, Series

MACHINE = Machine("a cpu", 2, 1 << 34, "6.1", "ext4", "3.11")


def run_of(*results: Result, error: str = "") -> Run:
    answer = Answer("full", "How long?", 3.0, results, error)
    return Run("abc", "2026-01-01", "full", MACHINE, {"borg": "1.2"}, 0.5, (answer,))


def test_the_page_has_every_bar_and_says_what_became_of_it(tmp_path: Path) -> None:
    run = run_of(Figure("full/zstd", (1.5, 1.6, 1.7), "cold"), Note("A note."), error="It broke")
    write_report(run, tmp_path, "## Findings")
    page = (tmp_path / "benchmarks.md").read_text()
    for bar in BARS:
        assert f"| {bar.row} | {bar.text}: {bar.kind}" in page
    assert "1.6 × (1.5 × to 1.7 ×) cold | **not met** |" in page
    assert page.count("| not measured | not measured |") == len(BARS) - 1
    for text in ("A note.", "**It failed**: It broke", "## Findings", "a cpu", "borg 1.2"):
        assert text in page


def test_the_page_is_the_same_each_time(tmp_path: Path) -> None:
    run = run_of(Series("w", "vmkeep", "s", (1.0,)), Series("w", "borg", "s", (2.0,)))
    for name in ("one", "other"):
        write_report(run, tmp_path / name)
    files = [
        {path.relative_to(top): path.read_bytes() for path in top.rglob("*") if path.is_file()}
        for top in (tmp_path / "one", tmp_path / "other")
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 2


def test_a_plot_is_sound_and_its_bars_are_as_long_as_the_medians() -> None:
    one = Series("w", "a <b> & c", "s", (1.0, 2.0, 4.0))
    other = Series("w", "limit", "s", (1.0,))
    root = ET.fromstring(bars("title", [one, other]))
    widths = [float(rect.attrib["width"]) for rect in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert widths[1] == pytest.approx(2 * widths[2], rel=0.01)
    assert "a <b> & c" in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_one_vm_for_one_day_is_what_its_chunks_are() -> None:
    rates = Rates(full_bytes_per_s=GIB, scan_bytes_per_s=10 * GIB, stored=0.5)
    found = cost(Fleet(1, disk_bytes=100 * GIB, days=1), rates)
    assert found.chunks == 100 * 1024
    assert found.stored_bytes == 50 * GIB
    assert found.packs == 50 * GIB // (64 * MIB) + 1
    assert (found.first_day_s, found.day_s) == (100, 10)


def test_growth_counts_what_is_shared_once() -> None:
    rates = Rates(GIB, GIB, 1.0)
    one, two = (cost(Fleet(vms, days=1, own=0.25), rates) for vms in (1, 2))
    assert two.chunks == one.chunks * 1.25
    year = cost(Fleet(1, days=365, changed=0.01), rates)
    assert year.chunks == one.chunks + 364 * (one.chunks // 100)


def test_rates_come_from_the_run_or_not_at_all() -> None:
    measured = (
        Series("corpus (a)", "vmkeep", "B", (100.0,)),
        Series("full backup of (a), warm", "restic", "s", (9.0,)),
        Series("full backup of (a), warm", "vmkeep", "s", (4.0, 5.0, 9.0)),
        Series("full backup of (a), warm: stored", "vmkeep", "B", (50.0,)),
        Series("unchanged disk (a)", "vmkeep", "s", (2.0,)),
    )
    assert rates_of(run_of(*measured)) == Rates(20.0, 50.0, 0.5)
    assert rates_of(run_of(*measured[:4])) is None
