"""A disk that is backed up over NBD: a DiskSource whose server holds it still.

What is data comes from `base:allocation`, what changed from a dirty bitmap's context; a server that
has neither is read in full. Both are asked for once and kept, as the disk does not change: at most
2 × 16 MiB; beyond that they are asked for anew each time.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

from engine.nbd.client import NbdClient
from engine.nbd.connection import NbdAddress
from engine.nbd.protocol import BASE_ALLOCATION, STATE_DIRTY, STATE_ZERO, Extent
from engine.snapshot.sources import FoundBy

CONNECTIONS = 3  # as many as a job on two cores has threads (bench/nbd.py)
# A running QEMU's server lets so many in, whatever they ask for (seen in 7.2.22; the fix of
# CVE-2024-7409). Another one waits for its answer until somebody leaves.
_MOST_TO_QEMU = 100
_MOST_KEPT_RANGES = 1 << 20


def connections_to_qemu(exports: int) -> int:
    """How many each of so many sources may have to one running QEMU, at the same time."""
    return max(1, min(CONNECTIONS, _MOST_TO_QEMU // exports))


class NbdSource:
    """A DiskSource over a client, which it owns."""

    def __init__(self, client: NbdClient, dirty_context: str) -> None:
        """`dirty_context`: one of the client's, or "" if nothing is known of the changes."""
        self._client = client
        self._dirty_context = dirty_context
        self._data = _Ranges(self._data_extents)
        self._dirty = _Ranges(self._dirty_extents)

    @classmethod
    def open(
        cls,
        address: NbdAddress,
        export: str = "",
        bitmap: str = "",
        *,
        timeout_s: float,
        connections: int = CONNECTIONS,
        place: str = "",
    ) -> NbdSource:
        """Connects, to a server that lets `connections` in. A `bitmap` that it does not export
        means: all may have changed. `place`: see NbdClient.connect.

        DiskServerLost, DiskServerRefused, DiskServerBroken.
        """
        dirty = f"qemu:dirty-bitmap:{bitmap}" if bitmap else ""
        contexts = [BASE_ALLOCATION, *([dirty] if dirty else [])]
        client = NbdClient.connect(
            address,
            export,
            contexts,
            timeout_s=timeout_s,
            connections=connections,
            place=place,
        )
        return cls(client, dirty if dirty in client.contexts else "")

    @property
    def capacity(self) -> int:
        return self._client.size_bytes

    def data_ranges(self) -> Iterator[tuple[int, int]]:
        return iter(self._data)

    @property
    def found_by(self) -> FoundBy:
        return "bitmap" if self._dirty_context else "scan"

    def changed_ranges(self) -> Iterator[tuple[int, int]] | None:
        return iter(self._dirty) if self._dirty_context else None

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Raises DiskServerLost, DiskServerRefused, DiskServerBroken."""
        return self._client.read_into(buffer, offset)

    def prefetch(self, offset: int, size_bytes: int) -> None:
        """Nothing: several requests are under way in any case."""

    def close(self) -> None:
        self._client.close()

    def _data_extents(self) -> Iterator[Extent]:
        if BASE_ALLOCATION not in self._client.contexts:
            return iter([Extent(0, self.capacity, 0)] if self.capacity else [])
        extents = self._client.extents(BASE_ALLOCATION)
        return (extent for extent in extents if not extent.flags & STATE_ZERO)

    def _dirty_extents(self) -> Iterator[Extent]:
        extents = self._client.extents(self._dirty_context)
        return (extent for extent in extents if extent.flags & STATE_DIRTY)


class _Ranges:
    """(offset, length) of some extents; kept once all were seen, if they are not too many."""

    def __init__(self, extents: Callable[[], Iterator[Extent]]) -> None:
        self._extents = extents
        self._kept: array[int] | None = None

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self._kept is not None:
            return zip(self._kept[::2], self._kept[1::2], strict=True)
        return self._asked()

    def _asked(self) -> Iterator[tuple[int, int]]:
        seen = array("q")
        for offset, size_bytes, _ in self._extents():
            if len(seen) < 2 * _MOST_KEPT_RANGES:
                seen.extend((offset, size_bytes))
            yield offset, size_bytes
        if len(seen) < 2 * _MOST_KEPT_RANGES:
            self._kept = seen
