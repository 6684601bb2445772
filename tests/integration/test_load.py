"""Everybody at once against one service, a real process: bench.soak_load for a minute."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.soak_load import Held, compare_held, load
from bench.witness import Wrong


@pytest.mark.slow
def test_sixty_four_clients_do_everything_at_once(fast_path: Path) -> None:
    done = load(fast_path, seconds=60, clients=64, vms=200, seed=1)
    verbs = ("list", "backup", "restore", "delete", "cancel", "collide", "gc", "verify")
    assert [verb for verb in verbs if not done[verb]] == []
    assert done["compared in the end"] >= 50


@pytest.mark.parametrize(
    "end",
    [Held(11, 20, 100), Held(10, 21, 100), Held(10, 20, 121)],
    ids=["a thread", "a descriptor", "memory"],
)
def test_what_leaks_is_noticed(end: Held) -> None:
    compare_held(Held(10, 20, 100), Held(10, 20, 120))
    with pytest.raises(Wrong, match="half way"):
        compare_held(Held(10, 20, 100), end)
