"""tests/conftest.py: under VMKEEP_STRICT=1 a skipped test makes the session fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SKIPPED = "import pytest\ndef test_a() -> None: pytest.skip('no such machine')\n"
EXPECTED_FAILURE = "import pytest\n@pytest.mark.xfail\ndef test_a() -> None: assert False\n"


@pytest.mark.parametrize(
    ("body", "strict", "status"),
    [(SKIPPED, "1", 1), (SKIPPED, "0", 0), (EXPECTED_FAILURE, "1", 0)],
)
def test_a_skip_fails_the_session(tmp_path: Path, body: str, strict: str, status: int) -> None:
    (tmp_path / "test_it.py").write_text(body)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_default_fixture_loop_scope = function\n"
    )
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.conftest",
        "test_it.py",
    ]
    env = os.environ | {"VMKEEP_STRICT": strict, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout
    assert ("skipped tests are failures" in done.stdout) == (status == 1)
