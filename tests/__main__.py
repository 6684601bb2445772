"""All tests: `python -m tests`, which `make test` runs. Any pytest works, too, but takes longer.

Each directory below this one gets a pytest of its own, two at a time: those that mostly wait for
a virtual machine leave time to those that compute. What one printed is shown when it has ended; at
the end there is one line for all, and what failed. Files of failed tests are kept.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent
AT_A_TIME = 2
ONE_TEST_S = 1800  # one that takes longer hangs: its pytest ends, and says where
# Started first, for the last one to end early. Any other order does as well, but takes longer.
LONGEST = ("libvirt", "crash", "fire", "integration", "nfs", "damage")

_COUNT = re.compile(r"(\d+) (passed|failed|skipped|xfailed|xpassed|error|deselected)")
_FAILED = re.compile(r"^(?:FAILED|ERROR) \S.*", re.MULTILINE)


class Ended(NamedTuple):
    """How a directory's pytest ended: its exit status, and all that it printed."""

    name: str
    status: int
    printed: str

    @property
    def counts(self) -> Counter[str]:
        """By outcome, of its last line."""
        last = self.printed.rstrip().rpartition("\n")[2]
        return Counter({what: int(number) for number, what in _COUNT.findall(last)})

    @property
    def complaints(self) -> list[str]:
        """Nothing when all went well."""
        ended = [f"tests/{self.name} ended with {self.status}"] if self.status else []
        return ended + _FAILED.findall(self.printed)


def directories(root: Path) -> list[str]:
    """Those with tests, anywhere below them, the longest first."""
    found = {path.relative_to(root).parts[0] for path in root.rglob("test_*.py")}
    return [name for name in LONGEST if name in found] + sorted(found.difference(LONGEST))


def run(root: Path, name: str, kept: Path) -> Ended:
    """Runs a directory's tests. Their files are below `kept`, and gone when none has failed."""
    command = [sys.executable, "-m", "pytest", str(root / name), f"--basetemp={kept / name}"]
    command += ["-o", f"faulthandler_timeout={ONE_TEST_S}", "-o", "faulthandler_exit_on_timeout=1"]
    output = kept / f"{name}.txt"  # not a pipe, which what a test left running would keep open
    with output.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode == 0:
        shutil.rmtree(kept / name, ignore_errors=True)
    return Ended(name, done.returncode, output.read_text(errors="replace"))


def told(all_ended: Sequence[Ended]) -> str:
    """What is said in the end."""
    counts = sum((ended.counts for ended in all_ended), Counter[str]())
    summed = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
    complaints = [line for ended in all_ended for line in ended.complaints]
    return "\n".join([*complaints, f"all tests: {summed or 'none'}"])


def main() -> int:
    """0 when all went well."""
    began_s = time.monotonic()
    all_ended = []
    kept = Path(tempfile.mkdtemp(prefix="vmkeep-tests-"))
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        running = [pool.submit(run, ROOT, name, kept) for name in directories(ROOT)]
        try:
            for one in as_completed(running):
                all_ended.append(one.result())
                print(all_ended[-1].printed, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    print(f"{told(all_ended)}; {time.monotonic() - began_s:.0f} s")
    failed = any(ended.status for ended in all_ended)
    if failed:
        print(f"files of what failed: {kept}")
    else:
        shutil.rmtree(kept)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
