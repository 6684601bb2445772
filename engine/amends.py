"""What has to be noted in the state, and could not be just now: tried again until it can be.

The data directory's disk may be full, or fail, for an hour. Without this a VM whose backup ended
in that hour would be busy, and refused all others, until the service is started again: only a start
(engine/recovery.py) looks at what is left in the middle of something.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeAlias

from storage.errors import StorageError

log = logging.getLogger(__name__)

AGAIN_S = 5.0
HANGS_AFTER_S = 1.0

Act: TypeAlias = Callable[[], None]


class Amends:
    """With a thread of its own, from `start` to `stop`. What is left then, the next start mends.

    Each retry has a thread, too: one that hangs, as with its point, holds up no other for longer
    than HANGS_AFTER_S, and is not begun a second time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: list[Act] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="amends", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Nothing is tried any more; returns within `timeout_s`."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def make(self, act: Act) -> None:
        """Does it. A StorageError is raised, and then it is done again until it raises none: so it
        has to do no harm twice, nor late."""
        try:
            act()
        except StorageError:
            with self._lock:
                self._left.append(act)
            raise

    def _run(self) -> None:
        while not self._stopped.wait(AGAIN_S):
            with self._lock:
                left, self._left = self._left, []
            for act in left:
                self._again(act)

    def _again(self, act: Act) -> None:
        thread = threading.Thread(target=self._try, args=(act,), name="amends-try", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread for it just now
            with self._lock:
                self._left.append(act)
        else:
            thread.join(HANGS_AFTER_S)

    def _try(self, act: Act) -> None:
        try:
            self.make(act)
        except StorageError as error:
            log.info("amends_not_made", extra={"error": str(error)})
        except Exception:
            log.exception("amends_failed")
        else:
            log.warning("amends_made")
