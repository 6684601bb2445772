"""vmkeep on a real NFS mount: the kernel's server and client, in a small virtual machine.

The machine is started once and runs all checks (tests/nfs/guest/); each is a test here. Every run
has those that a release rests on; VMKEEP_SOAK=1 adds the others. Needs root, and the first time a
Debian mirror (tests/nfs/kit.py).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from tests.nfs.guest.run import REST, SHORT, Result
from tests.nfs.kit import ROOT, NoKit, find_tool, make_kit
from tests.nfs.vm import Ran, run_vm

BIG_BYTES = 512 << 20  # sparse
SMALL_BYTES = 64 << 20
TIMEOUT_S = 900.0  # a busy machine takes several times what an idle one does
CHECKS = [
    check.__name__ for check in (*SHORT, *(REST if os.environ.get("VMKEEP_SOAK") == "1" else ()))
]

pytestmark = [pytest.mark.root, pytest.mark.slow]


@dataclass(frozen=True, slots=True)
class Machine:
    """How the machine's run went."""

    ran: Ran
    results: dict[str, Result]


@pytest.fixture(scope="module")
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """The machine after it has run all checks that were selected."""
    if os.geteuid() != 0:
        pytest.skip("needs root (the machine shares the root file system as it is)")
    try:
        kit = make_kit()
    except NoKit as error:
        pytest.skip(str(error))
    work = tmp_path_factory.mktemp("nfs")
    disks = [_disk(work / "big", BIG_BYTES), _disk(work / "small", SMALL_BYTES)]
    results = work / "results"
    asked = {item.name for item in request.session.items}
    names = [check for check in CHECKS if f"{test_on_real_nfs.__name__}[{check}]" in asked]
    command = [sys.executable, "-m", "tests.nfs.guest.run", str(results), *names]
    line = f"cd {shlex.quote(str(ROOT))} && {shlex.join(command)}"
    ran = run_vm(kit, work, line, disks, TIMEOUT_S)
    lines = results.read_bytes().splitlines() if results.exists() else []
    found = [msgspec.json.decode(line, type=Result) for line in lines]
    return Machine(ran, {result.name: result for result in found})


def _disk(path: Path, size_bytes: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    subprocess.run([find_tool("mke2fs"), "-q", "-t", "ext4", "-F", str(path)], check=True)
    return path


@pytest.mark.parametrize("check", CHECKS)
def test_on_real_nfs(machine: Machine, check: str) -> None:
    result = machine.results.get(check)
    assert result is not None, f"the machine did not get that far: {machine.ran.console[-3000:]}"
    print(f"{result.seconds} s in the machine", *result.notes, sep="\n")
    assert not result.trace, result.trace


def test_the_machine_ended_by_itself(machine: Machine) -> None:
    assert machine.ran.status == 0, machine.ran.console[-3000:]
