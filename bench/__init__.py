"""The demo, the soaks and the benchmarks: one question per file.

A *question* is a module of this package with

    QUESTION: str                                  one line, as it stands in docs/benchmarks.md
    def run(lab: Lab) -> Iterator[Result]: ...     yields Series, Figures and Notes as it goes

and, to work alone as `python -m bench.NAME`:

    if __name__ == "__main__":
        sys.exit(alone(__file__))                  # from bench.runner

`python -m bench` (`make bench`, `make bench-quick`) finds them by that convention and runs them
all; the order is bench.runner's. What a module may count on:

- `lab.pick(quick, full)` for every size. All questions together take under 3 minutes when quick.
- `lab.scratch()` for a new directory that is gone afterwards; `corpus(lab, "a")` of
  bench.corpora for a disk image; never a path of its own.
- `lab.measure(argv)` for a command's time, CPU time and its process tree's peak memory;
  `lab.interleave({who: act})` for pairs: A B A B …, so that a busy machine slows both.
- A Series holds every value measured, a Figure answers a bar of bench.bars by its key: also every
  value, one per pair. Medians and spreads are made when the report is. A bar that can't be measured
  here gets a Note with the reason; it stays in the table in any case.

Read on: results.py, bars.py, lab.py, runner.py; report.py makes docs/benchmarks.md of a run.
"""
