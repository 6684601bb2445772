"""Two services, real processes, on one point: bench.soak_two in small."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.soak_two import shifted_clock, two_clusters, two_hosts


@pytest.fixture(autouse=True)
def other_clock() -> None:
    if not shifted_clock("+3d"):
        pytest.skip("needs libfaketime")


@pytest.mark.slow
def test_one_cluster_deletes_what_the_other_imports(fast_path: Path) -> None:
    done = two_clusters(fast_path, 60)
    assert done["imported"] + done["too late"] == 60
    assert done["imported"] >= 5
    assert done["compared"] >= 1


@pytest.mark.slow
def test_two_hosts_share_a_domain(fast_path: Path) -> None:
    done = two_hosts(fast_path, 15)
    assert done == {"backups": 30, "compared": 6, "clock_off": 1}
