"""Fixtures for all tests, and the strict mode.

With VMKEEP_STRICT=1 a test that is skipped makes the session fail: a machine that is meant to run
everything must not lose tests silently.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fire.loops import enter_own_mounts

LoopFs = Callable[[str, int], Path]

_MAKE_FS = {
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "ext4": ["mke2fs", "-q", "-t", "ext4", "-F"],
}
_SKIPPED: list[str] = []


def pytest_configure() -> None:
    enter_own_mounts()  # libvirtd's tests, beside those that pull the plug, make mount namespaces


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        _SKIPPED.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if os.environ.get("VMKEEP_STRICT") == "1" and _SKIPPED and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ.get("VMKEEP_STRICT") == "1" and _SKIPPED:
        terminalreporter.section("VMKEEP_STRICT=1: skipped tests are failures", red=True)
        for nodeid in _SKIPPED:
            terminalreporter.line(nodeid)


@pytest.fixture
def loop_fs(tmp_path: Path) -> Iterator[LoopFs]:
    """`loop_fs(kind, size_bytes)`: the mount point of a new xfs, btrfs or ext4 file system."""
    with contextlib.ExitStack() as undo:

        def make(kind: str, size_bytes: int) -> Path:
            tool = _MAKE_FS[kind][0]
            if os.geteuid() != 0:
                pytest.skip("needs root (loop mounts)")
            if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin") is None:
                pytest.skip(f"needs {tool}")
            number = len(list(tmp_path.glob("*.img")))
            image, place = tmp_path / f"{kind}{number}.img", tmp_path / f"{kind}{number}"
            place.mkdir()
            with image.open("wb") as file:
                file.truncate(size_bytes)
            subprocess.run([*_MAKE_FS[kind], str(image)], check=True)
            mounted = subprocess.run(
                ["mount", "-o", "loop", str(image), str(place)],
                capture_output=True,
                text=True,
                check=False,
            )
            if mounted.returncode:
                pytest.skip(f"no loop mount of {kind} here: {mounted.stderr.strip()}")
            undo.callback(subprocess.run, ["umount", str(place)], check=True)
            return place

        yield make
