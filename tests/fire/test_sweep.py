"""The process dies, or a call fails, at calls of each verb; all of them: see sweep.py."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fire.script import VERBS
from tests.fire.sweep import FAULTS, sweep

# One in so many calls here, another one for each fault, and every call in `make soak`.
STRIDE = 47


@pytest.fixture
def memory() -> Iterator[Path]:
    """Thousands of fsyncs, and none of them is the point here."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vmkeep-sweep-", dir=parent) as path:
        yield Path(path)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_a_call(memory: Path, verb: str, fault: str) -> None:
    start = 1 + list(FAULTS).index(fault) * STRIDE // len(FAULTS)
    assert sweep(memory, verb, fault, STRIDE, start) >= 2
