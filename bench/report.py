"""docs/benchmarks.md and its plots, made of the results of a run.

    python -m bench.report [--run FILE] [--into DIR]

FILE is docs/benchmarks/run.json unless told otherwise; `python -m bench --json FILE` writes it.
Nothing in the page is written by hand but docs/benchmarks/findings.md, what profiles showed, which
is put in as it is when it is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.growth import growth_table
from bench.plot import bars
from bench.results import Answer, Note, Run, Series, read_run
from bench.summary import Verdict, amount, quoted, verdicts

DOCS = Path(__file__).parent.parent / "docs"
STATES = {True: "met", False: "**not met**", None: "not measured"}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page and its plots."""
    parser = argparse.ArgumentParser(prog="python -m bench.report")
    parser.add_argument("--run", type=Path, default=DOCS / "benchmarks" / "run.json")
    parser.add_argument("--into", type=Path, default=DOCS)
    given = parser.parse_args(argv)
    findings = given.into / "benchmarks" / "findings.md"
    text = findings.read_text() if findings.exists() else ""
    write_report(read_run(given.run), given.into, text)
    return 0


def write_report(run: Run, into: Path, findings: str = "") -> None:
    """`into`/benchmarks.md, and `into`/benchmarks/*.svg."""
    plots = into / "benchmarks"
    plots.mkdir(parents=True, exist_ok=True)
    for answer in run.answers:
        for number, (what, each) in enumerate(_plotted(answer)):
            (plots / _plot_name(answer, number)).write_text(bars(what, each))
    (into / "benchmarks.md").write_text("".join(f"{line}\n" for line in _page(run, findings)))


def _page(run: Run, findings: str) -> Iterator[str]:
    yield "# Benchmarks"
    yield ""
    yield "Made by `python -m bench.report` from `docs/benchmarks/run.json`; don't edit it."
    yield ""
    yield from _source(run)
    yield ""
    yield "## The bars"
    yield ""
    yield from _bars(verdicts(run.answers))
    if findings:
        yield ""
        yield findings.rstrip()
    yield ""
    yield from growth_table(run)
    for answer in run.answers:
        yield ""
        yield from _section(answer)


def _source(run: Run) -> Iterator[str]:
    machine = run.machine
    peers = ", ".join(f"{name} {version}" for name, version in sorted(run.peers.items()))
    yield f"- scale: {run.scale}; began {run.began}; commit {run.commit or 'unknown'}"
    yield (
        f"- machine: {machine.cpu}, {machine.cores} cores, {amount(machine.memory_bytes, 'B')} of"
        f" memory, Linux {machine.kernel}, {machine.file_system}, Python {machine.python}"
    )
    yield f"- load average when it began: {run.load:.1f} (other work slows all, not all equally)"
    yield f"- peers: {peers or 'none installed'}; their settings are in `bench/peers.py`"
    yield "- every value is a median of runs done in turns, with the least and the greatest"
    if run.scale == "quick":
        yield (
            "- **a quick run**: small images, of which starting a program is a large part. Whether"
            " a bar is met is for `make bench` to say."
        )


def _bars(found: Sequence[Verdict]) -> Iterator[str]:
    yield "| what | bar | measured | |"
    yield "|---|---|---|---|"
    for verdict in found:
        how = f" {verdict.how}" if verdict.how else ""
        yield (
            f"| {verdict.bar.row} | {verdict.bar.text}: {verdict.wanted()} |"
            f" {verdict.measured()}{how} | {STATES[verdict.met]} |"
        )


def _section(answer: Answer) -> Iterator[str]:
    yield f"## {answer.question}"
    yield ""
    yield f"`python -m bench.{answer.module}`, {answer.took_s:.0f} s"
    for result in answer.results:
        if isinstance(result, Note):
            yield ""
            yield result.text
    if answer.error:
        yield ""
        yield f"**It failed**: {answer.error.splitlines()[0]}"
    for number, (what, _) in enumerate(_plotted(answer)):
        yield ""
        yield f"![{what}](benchmarks/{_plot_name(answer, number)})"
    yield ""
    yield "| what | who | measured |"
    yield "|---|---|---|"
    for result in answer.results:
        if isinstance(result, Series):
            yield f"| {result.what} | {result.who} | {quoted(result.values, result.unit)} |"


def _plotted(answer: Answer) -> list[tuple[str, list[Series]]]:
    """Times that have something to be compared with."""
    groups: dict[str, list[Series]] = {}
    for result in answer.results:
        if isinstance(result, Series) and result.unit == "s":
            groups.setdefault(result.what, []).append(result)
    return [(what, each) for what, each in groups.items() if len(each) > 1]


def _plot_name(answer: Answer, number: int) -> str:
    return f"{answer.module}-{number}.svg"


if __name__ == "__main__":
    sys.exit(main())
