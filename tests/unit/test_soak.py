"""`make soak` keeps to its time, and never takes a failure for an end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak import SWEEPS, Sweep, soak


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that lives for so many seconds and returns such a code."""
    text = "import sys, time\ntime.sleep(float(sys.argv[1]))\nsys.exit(int(sys.argv[2]))\n"
    (tmp_path / "sweep_of_test.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "sweep_of_test"


def test_each_says_how_it_went(module: str) -> None:
    sweeps = [
        Sweep("short", module, "0 0", 1),
        Sweep("wrong", module, "0 1", 1),
        Sweep("long", module, "600 0", 2),
        Sweep("last", module, "0 0", 1),
    ]
    found = [(name, verdict) for name, verdict, _ in soak(sweeps, 0.1)]
    assert found == [
        ("short", "ended"),
        ("wrong", "FAILED"),
        ("long", "cut off"),
        ("last", "ended"),
    ]


def test_one_that_fails_when_it_is_cut_off_has_failed(tmp_path: Path, module: str) -> None:
    text = "import sys, time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: sys.exit(1)\n"
    (tmp_path / "sweep_of_test.py").write_text(text)
    [outcome] = soak([Sweep("bad", module, "", 1)], 0.05)
    assert outcome.verdict == "FAILED"


def test_without_a_budget_each_runs_whole(module: str) -> None:
    [outcome] = soak([Sweep("whole", module, "1 0", 1, takes_minutes=True)], None)
    assert outcome.verdict == "ended"


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.name)
def test_every_command_is_there(sweep: Sweep) -> None:
    """The module knows its options: `--help` after them is the only thing that it does."""
    command = [*sweep.command(1.0), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
    assert sys.executable == command[0]
