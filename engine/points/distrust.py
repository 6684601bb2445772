"""What is known to be damaged on the points, kept over restarts.

A verify, restore or gc that finds a chunk damaged tells the domain (storage.view.trust), so that
the next backup that has its content stores it anew. What was healed, or deleted, is forgotten here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.model import Distrust
from engine.state import Rows, State, distrust_key
from storage.domain.domain import Domain
from storage.errors import StorageError

if TYPE_CHECKING:
    from engine.points.points import Points

MOST_CHUNKS = 4096  # of one pack; with more of them damaged, all of it is distrusted


def remember_distrusted(
    state: State, points: Points, point_uuid: str, clusters: Iterable[str]
) -> None:
    """Writes down what these clusters' domains distrust now. A point that is gone is no error."""
    for cluster_uuid in clusters:
        try:
            domain = points.domain(point_uuid, cluster_uuid)
            found = domain.trust.withdrawn()
        except (EngineError, StorageError):
            continue
        rows = {
            row.pack: row
            for row in (
                _row(point_uuid, cluster_uuid, pack, chunks) for pack, chunks in found.items()
            )
        }
        before = _distrusts_of(state.distrusts, point_uuid, cluster_uuid)
        gone = [distrust_key(row) for row in before if row.pack not in rows]
        if gone:
            state.distrusts.delete(*gone)
        fresh = [row for row in rows.values() if row not in before]
        if fresh:
            state.distrusts.put_all(fresh)


def recall_distrusted(
    distrusts: Rows[Distrust], point_uuid: str, cluster_uuid: str, domain: Domain
) -> None:
    """Tells a domain that was just opened what it has to distrust."""
    for row in _distrusts_of(distrusts, point_uuid, cluster_uuid):
        domain.trust.withdraw(row.pack, frozenset(row.chunks) if row.chunks else None)


def _distrusts_of(distrusts: Rows[Distrust], point_uuid: str, cluster_uuid: str) -> list[Distrust]:
    wanted = (point_uuid, cluster_uuid)
    return [row for row in distrusts.values() if (row.point_uuid, row.cluster_uuid) == wanted]


def _row(
    point_uuid: str, cluster_uuid: str, pack: str, chunks: frozenset[bytes] | None
) -> Distrust:
    named = () if chunks is None or len(chunks) > MOST_CHUNKS else tuple(sorted(chunks))
    return Distrust(point_uuid=point_uuid, cluster_uuid=cluster_uuid, pack=pack, chunks=named)
