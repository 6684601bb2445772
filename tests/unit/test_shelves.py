"""engine.catalogue.shelves, by way of the catalogue: what every filter finds, as all rows say."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import overload

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.catalogue.catalogue import Catalogue
from engine.catalogue.shelves import Run, page_of, place_of
from engine.inventory.scopes import Range
from engine.model import BACKUP_DONE, BACKUP_FAILED, BACKUP_RUNNING, Backup, Cluster, Namespace
from engine.state import State
from engine.verb_types import BackupQuery
from tests.unit.test_catalogue import row

CLUSTERS, NAMESPACES, POINTS, VMS = "cd", "nm", "pq", "vw"
TEXTS = ("", "daily", "Daily", "weekly by plan")
RANGES: list[Range] = [
    (Cluster(uuid=cluster, name=""), Namespace(uuid=namespace, name="", tenant="t"))
    for cluster in CLUSTERS
    for namespace in NAMESPACES
]

rows = st.builds(
    lambda number, at, status, cluster, namespace, point, vm, name, description: row(
        f"u{number}",
        at,
        status=status,
        cluster=cluster,
        namespace=namespace,
        point=point,
        vm=vm,
        name=name,
        description=description,
    ),
    st.integers(0, 15),
    st.integers(1, 6),
    st.sampled_from((BACKUP_DONE, BACKUP_RUNNING, BACKUP_FAILED)),
    st.sampled_from(CLUSTERS),
    st.sampled_from(NAMESPACES),
    st.sampled_from(POINTS),
    st.sampled_from(VMS),
    st.sampled_from(TEXTS),
    st.sampled_from(TEXTS),
)
queries = st.builds(
    BackupQuery,
    vm_uuid=st.sampled_from(("", *VMS, "none")),
    name_part=st.sampled_from(("", "aily", "D")),
    description_part=st.sampled_from(("", "plan")),
    point_uuid=st.sampled_from(("", *POINTS)),
    start_time=st.integers(0, 7),
    end_time=st.integers(0, 7),
    page=st.integers(0, 4),
    page_size=st.sampled_from((1, 3, 20)),
)


def matches(one: Backup, query: BackupQuery) -> bool:
    """What the HTTP contract says, word for word."""
    label = one.label
    return (
        query.vm_uuid in ("", label.vm_uuid)
        and query.point_uuid in ("", one.point_uuid)
        and query.name_part in label.name
        and query.description_part in label.description
        and query.start_time <= label.create_time <= (query.end_time or label.create_time)
    )


def expected(all_rows: Sequence[Backup], ranges: Sequence[Range], query: BackupQuery) -> object:
    places = [(cluster.uuid, namespace.uuid) for cluster, namespace in ranges]
    found = [
        one
        for one in all_rows
        if matches(one, query) and (one.cluster_uuid, one.label.namespace) in places
    ]
    found.sort(key=lambda one: (-one.label.create_time, one.uuid, one.cluster_uuid))
    first = (max(query.page, 1) - 1) * query.page_size
    totals = [
        sum((one.cluster_uuid, one.label.namespace) == place for one in found) for place in places
    ]
    return found[first : first + query.page_size], len(found), totals


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(rows, max_size=12), max_size=3),
    st.lists(rows, max_size=8),
    st.lists(queries, min_size=1, max_size=8),
    st.lists(st.sampled_from(RANGES), unique_by=lambda one: (one[0].uuid, one[1].uuid)),
)
def test_every_filter_finds_what_a_look_at_all_rows_does(
    puts: list[list[Backup]], removed: list[Backup], asked: list[BackupQuery], ranges: list[Range]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        state = State(directory)
        catalogue = Catalogue(state)
        kept: dict[tuple[str, str], Backup] = {}
        for some in puts:
            catalogue.put_all(some)
            kept.update({(one.cluster_uuid, one.uuid): one for one in some})
        for one in removed:
            catalogue.remove(one)
            kept.pop((one.cluster_uuid, one.uuid), None)
        for again in (catalogue, Catalogue(state)):  # and after a restart
            for query in asked:
                page = again.query(ranges, query)
                totals = [found.total for found in page.ranges]
                answer = page.rows, page.total, totals
                assert answer == expected([*kept.values()], ranges, query)
            for point in POINTS:
                done = [each for each in kept.values() if each.status == BACKUP_DONE]
                assert again.count(point) == sum(each.point_uuid == point for each in done)
        state.close()


@settings(deadline=None)
@given(st.lists(st.sets(st.integers(0, 60))), st.integers(0, 80), st.integers(1, 30))
def test_a_page_of_many_runs_is_a_slice_of_them_all(
    runs: list[set[int]], skipped: int, count: int
) -> None:
    rows = [
        [row(f"{at}", -number) for number in sorted(numbers)] for at, numbers in enumerate(runs)
    ]
    found = page_of([Run(run, 0, len(run)) for run in rows], skipped, count)
    in_order = sorted((one for run in rows for one in run), key=place_of)
    assert found == in_order[skipped : skipped + count]


def test_a_page_far_behind_is_not_walked_to() -> None:
    """Only the rows that are compared are made: a walk would take minutes."""

    class Even(Sequence[Backup]):
        def __len__(self) -> int:
            return 1 << 40

        @overload
        def __getitem__(self, at: int) -> Backup: ...
        @overload
        def __getitem__(self, at: slice) -> Sequence[Backup]: ...
        def __getitem__(self, at: int | slice) -> Backup | Sequence[Backup]:
            if isinstance(at, slice):
                return [self[one] for one in range(at.start, at.stop)]
            return row("", -2 * at)

    far = 1 << 39
    odd = row("", -(2 * far + 1))
    found = page_of([Run(Even(), 0, 1 << 40), Run([odd], 0, 1)], far, 3)
    assert [-one.label.create_time - 2 * far for one in found] == [0, 1, 2]
