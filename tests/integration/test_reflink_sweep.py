"""A small part of tests/reflink_sweep.py; `make soak` does 10,000 rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import LoopFs
from tests.reflink_sweep import remount, sweep
from tests.tracking_rig import TrackedRig

ROUNDS = 100


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_no_round_makes_a_wrong_backup(loop_fs: LoopFs, tmp_path: Path, kind: str) -> None:
    pool = loop_fs(kind, 400 << 20)
    image = pool.with_suffix(".img")
    with TrackedRig(tmp_path, pool) as rig:
        sweep(rig, ROUNDS, 20261123, lambda: remount(image, pool))
        rig.state.close()
