"""What is known to be damaged on the points, kept over restarts.

A verify, restore or gc that finds a chunk damaged tells the domain (storage.view.trust), so that
the next backup that has its content stores it anew. What was healed, or deleted, is forgotten here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.model import Distrust
from engine.state import Rows, State, distrust_key
from storage.domain.domain import Domain
from storage.errors import StorageError

if TYPE_CHECKING:
    from engine.points.points import Points

log = logging.getLogger(__name__)

MOST_CHUNKS = 4096  # of one pack; with more of them damaged, all of it is distrusted


def remember_distrusted(
    state: State, points: Points, point_uuid: str, clusters: Iterable[str]
) -> None:
    """Writes down what these clusters' domains distrust now.

    A point that is gone is no error; nor is a state that can't be written, for the jobs that end
    with this have more to put right: the domains still know it, and the next call writes it.
    """
    for cluster_uuid in clusters:
        try:
            domain = points.domain(point_uuid, cluster_uuid)
        except (EngineError, StorageError):
            continue
        try:
            domain.trust.keep(partial(_write_down, state, point_uuid, cluster_uuid))
        except StorageError:
            log.exception("distrust_not_remembered", extra={"point": point_uuid})


def _write_down(
    state: State,
    point_uuid: str,
    cluster_uuid: str,
    found: Mapping[str, frozenset[bytes] | None],
) -> None:
    rows = [_row(point_uuid, cluster_uuid, pack, chunks) for pack, chunks in found.items()]
    before = _of_domain(state.distrusts.values(), point_uuid, cluster_uuid)
    gone = [distrust_key(row) for row in before if row.pack not in found]
    if gone:
        state.distrusts.delete(*gone)
    fresh = [row for row in rows if row not in before]
    if fresh:
        state.distrusts.put_all(fresh)


def recall_distrusted(
    distrusts: Rows[Distrust], point_uuid: str, cluster_uuid: str, domain: Domain
) -> None:
    """Tells a domain that was just opened what it has to distrust."""
    for row in _of_domain(distrusts.values(), point_uuid, cluster_uuid):
        domain.trust.withdraw(row.pack, frozenset(row.chunks) if row.chunks else None)


def _of_domain(rows: Iterable[Distrust], point_uuid: str, cluster_uuid: str) -> list[Distrust]:
    return [row for row in rows if (row.point_uuid, row.cluster_uuid) == (point_uuid, cluster_uuid)]


def _row(
    point_uuid: str, cluster_uuid: str, pack: str, chunks: frozenset[bytes] | None
) -> Distrust:
    named = () if chunks is None or len(chunks) > MOST_CHUNKS else tuple(sorted(chunks))
    return Distrust(point_uuid=point_uuid, cluster_uuid=cluster_uuid, pack=pack, chunks=named)
