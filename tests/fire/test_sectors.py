"""A real device with bad sectors below a backup point, in a small VM. See sectors.py."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.fire.plug import MAKE_FS, SIZE_BYTES
from tests.fire.sectors import ALL, SHORT
from tests.nfs.guest.run import Result
from tests.nfs.kit import ROOT, NoKit, find_tool, make_kit
from tests.nfs.vm import run_vm

TIMEOUT_S = 900.0  # a busy machine takes several times what an idle one does
SOAK = os.environ.get("VMKEEP_SOAK") == "1"
KINDS = ["ext4", "xfs"] if SOAK else ["ext4"]
NAMES = [check.__name__ for check in (ALL if SOAK else SHORT)]


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sectors_that_go_bad(tmp_path: Path, kind: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root (the machine shares the root file system as it is)")
    try:
        kit = make_kit()
    except NoKit as error:
        pytest.skip(str(error))
    disk, results = tmp_path / "disk", tmp_path / "results"
    with disk.open("wb") as file:
        file.truncate(SIZE_BYTES[kind])
    subprocess.run([find_tool(MAKE_FS[kind][0]), *MAKE_FS[kind][1:], disk], check=True)
    command = [sys.executable, "-m", "tests.fire.sectors", str(results), kind, *NAMES]
    line = f"cd {shlex.quote(str(ROOT))} && {shlex.join(command)}"
    ran = run_vm(kit, tmp_path, line, [disk], TIMEOUT_S)
    lines = results.read_bytes().splitlines() if results.exists() else []
    found = [msgspec.json.decode(line, type=Result) for line in lines]
    for result in found:
        print(f"{result.name}: {result.seconds} s in the machine")
        assert not result.trace, result.trace
    assert ran.status == 0, ran.console[-3000:]
    assert [result.name for result in found] == NAMES
