"""How long VMs were stunned: stood still for their snapshots, since the start of the service.

(A job that stalls is another thing: engine/jobs/hangs.py.)
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Stun:
    """Seconds of all snapshots, and of the longest."""

    count: int = 0
    sum_s: float = 0.0
    longest_s: float = 0.0

    def and_one_of(self, seconds: float) -> Stun:
        return Stun(self.count + 1, self.sum_s + seconds, max(self.longest_s, seconds))


@dataclass(frozen=True, slots=True)
class StunState:
    """`clone`: writers stood still while a VM's disks were cloned. `freeze`: guests were frozen."""

    clone: Stun = Stun()
    freeze: Stun = Stun()


class Stuns:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state = StunState()

    @property
    def state(self) -> StunState:
        return self._state

    def add(self, clone_s: float, freeze_s: float) -> None:
        """Counts one snapshot; 0 = there was no such thing."""
        with self._lock:
            if clone_s:
                self._state = replace(self._state, clone=self._state.clone.and_one_of(clone_s))
            if freeze_s:
                self._state = replace(self._state, freeze=self._state.freeze.and_one_of(freeze_s))
