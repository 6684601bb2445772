"""tests/__main__.py: the pytest of each directory, and what is said of all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import __main__ as all_tests
from tests.__main__ import ROOT, Ended, directories, run, told

PASSES = "def test_a() -> None: pass\ndef test_b() -> None: pass\n"
FAILS = "def test_c(tmp_path) -> None: (tmp_path / 'left').touch(); assert False\n"
HANGS = "import time\ndef test_e() -> None: time.sleep(600)\n"
DIES = "import os\ndef test_d() -> None: os._exit(7)\n"


def test_every_test_is_in_one_of_the_directories() -> None:
    found = directories(ROOT)
    assert len(set(found)) == len(found)
    assert set(all_tests.LONGEST) <= set(found)
    for path in ROOT.rglob("test_*.py"):
        assert path.relative_to(ROOT).parts[0] in found, path
        assert path.parent != ROOT, path


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "tree"
    for name, body in (("good", PASSES), ("bad", FAILS), ("dead", DIES)):
        (root / name).mkdir(parents=True)
        (root / name / f"test_{name}.py").write_text(body)
    (root / "pytest.ini").write_text("[pytest]\naddopts = -ra\n")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # which takes a second
    monkeypatch.setattr(all_tests, "ROOT", root)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return root


def test_what_failed_is_said_and_its_files_are_kept(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert directories(tree) == ["bad", "dead", "good"]
    assert all_tests.main() == 1
    said = capsys.readouterr().out
    assert "all tests: 1 failed, 2 passed; " in said
    assert re.search(r"^tests/bad ended with 1\nFAILED .*bad/test_bad.py::test_c", said, re.M)
    assert "tests/dead ended with 7" in said
    assert "tests/good" not in said
    (left,) = tmp_path.glob("vmkeep-tests-*/bad/test_c0/left")
    assert str(left.parents[2]) in said


def test_when_all_is_well_nothing_is_left(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("bad", "dead"):
        (tree / name / f"test_{name}.py").unlink()
    assert all_tests.main() == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("all tests: 2 passed; ")
    assert list(tmp_path.glob("vmkeep-tests-*")) == []


def test_a_test_that_hangs_ends(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(all_tests, "ONE_TEST_S", 1)
    (tree / "good" / "test_good.py").write_text(HANGS)
    ended = run(tree, "good", tmp_path)
    assert ended.status
    assert "in test_e" in ended.printed


def test_a_directory_without_tests_is_no_success(tree: Path, tmp_path: Path) -> None:
    (tree / "good" / "test_good.py").write_text("")
    ended = run(tree, "good", tmp_path)
    assert ended.complaints == [f"tests/good ended with {ended.status}"]


def test_outcomes_are_summed() -> None:
    ended = [
        Ended("a", 0, "x\n=== 3 passed, 1 skipped, 2 warnings in 1.00s (0:00:01) ===\n"),
        Ended("b", 0, "=== 1 failed, 2 passed, 1 error in 1.00s ===\n"),
    ]
    assert told(ended) == "all tests: 1 error, 1 failed, 5 passed, 1 skipped"
