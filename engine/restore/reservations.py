"""Whether pools have room for restores that are about to begin, or under way.

Room belongs to the file system, and pools may share one, so it is added up by device. A restore
that is under way keeps the part of its need that it has not written yet reserved, until all of it
is set aside in its volumes.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine.errors import PoolFull
from engine.inventory.volumes import errors_of, pool_room
from engine.model import Pool


@dataclass(frozen=True, slots=True)
class _Claim:
    needs: Mapping[int, int]  # bytes by device
    left: Callable[[], float]  # which share of it is still to be written, 1 to 0


class Reservations:
    """Those of this host. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._claims: dict[str, _Claim] = {}

    def claim(
        self, key: str, needs: Mapping[Pool, int], left: Callable[[], float] = lambda: 1.0
    ) -> None:
        """Reserves `needs` (bytes by pool) until `release(key)`. PoolFull, PoolUnreachable."""
        devices: Counter[int] = Counter()
        pools: dict[int, Pool] = {}
        for pool, need in needs.items():
            device = _device(pool)
            devices[device] += need
            pools[device] = pool
        # Before the lock, for which all others would wait with a pool that does not answer.
        free = {device: pool_room(pool)[1] for device, pool in pools.items()}
        with self._lock:
            for device, need in devices.items():
                self._require(pools[device], device, need, free[device])
            self._claims[key] = _Claim(devices, left)

    def release(self, key: str) -> None:
        """Gives back what was claimed; nothing claimed is no error."""
        with self._lock:
            self._claims.pop(key, None)

    def _require(self, pool: Pool, device: int, need: int, free: int) -> None:
        promised = sum(
            int(claim.needs.get(device, 0) * claim.left()) for claim in self._claims.values()
        )
        if need > free - promised:
            raise PoolFull(
                f"pool {pool.name} has {max(free - promised, 0)} bytes left; {need} are needed"
            )


def _device(pool: Pool) -> int:
    with errors_of(pool):
        return os.stat(pool.path).st_dev
