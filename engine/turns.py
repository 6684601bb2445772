"""Turns at what may not answer: a few callers are at it at once, all others wait, but not for good.

Whoever waits has a thread, as who hangs has one. So nobody waits for those that seem to hang: when
no turn has begun for a while, and all are taken, the next one is refused, at once.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator


class Turns:
    """`at_once` of them for each key. Thread-safe."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._given_back = threading.Condition()
        self._began_s: defaultdict[str, list[float]] = defaultdict(list)  # of those taken, by key

    @contextlib.contextmanager
    def one(self, key: str, timeout_s: float, refusal: Exception) -> Iterator[None]:
        """Has one inside the block. Raises `refusal` when all are taken, for `timeout_s` each."""
        with self._given_back:
            while len(taken := self._began_s[key]) >= self._at_once:
                left_s = max(taken) + timeout_s - time.monotonic()
                if left_s <= 0:
                    raise refusal
                self._given_back.wait(left_s)
            began_s = time.monotonic()
            taken.append(began_s)
        try:
            yield
        finally:
            with self._given_back:
                taken.remove(began_s)
                if not taken:
                    del self._began_s[key]
                self._given_back.notify_all()
