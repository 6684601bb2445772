"""The order of the catalogue: a page of backups, and how many there are, without looking at all.

A shelf is a sorted list, newest first, of the backups of one cluster, namespace and point; there is
a second set of shelves for each VM. So every exact filter picks shelves, a time range is two
bisections in each, a total is a difference of places, and a page of several shelves is found by
bisection too, however far behind it is. Only texts are looked through (engine.catalogue.texts).

In memory only, made anew from the rows at every start; not thread-safe: engine.catalogue.catalogue
locks.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeAlias, overload

from engine.catalogue.texts import Texts
from engine.model import Backup
from engine.verb_types import BackupQuery

Place: TypeAlias = tuple[int, str, str]  # newest first, then uuid, then cluster
Where: TypeAlias = tuple[str, str]  # cluster, namespace


class Run(NamedTuple):
    """The rows from `first` to before `last`, in the order of their places."""

    rows: Sequence[Backup]
    first: int
    last: int


class Shelf:
    """Backups in order. The three lists are parallel."""

    def __init__(self) -> None:
        self.rows: list[Backup] = []
        self._names = Texts()
        self._descriptions = Texts()

    def append(self, row: Backup, name: str, description: str) -> None:
        """One that comes behind all that are there."""
        self.rows.append(row)
        self._names.append(name)
        self._descriptions.append(description)

    def add(self, row: Backup, name: str, description: str) -> None:
        at = bisect_left(self.rows, place_of(row), key=place_of)
        self.rows.insert(at, row)
        self._names.insert(at, name)
        self._descriptions.insert(at, description)

    def remove(self, place: Place) -> None:
        """It has to be there."""
        at = bisect_left(self.rows, place, key=place_of)
        del self.rows[at]
        self._names.remove(at)
        self._descriptions.remove(at)

    def found(self, query: BackupQuery) -> Run:
        """Those that the query's times and texts leave."""
        first = _before(self.rows, query.end_time) if query.end_time else 0
        last = len(self.rows)
        if query.start_time:
            last = max(first, _before(self.rows, query.start_time - 1))
        if not (query.name_part or query.description_part):
            return Run(self.rows, first, last)
        # By number: what does not fit is not touched, and it lies all over the memory.
        fits: Sequence[int] = range(first, last)
        if query.name_part:
            fits = self._names.having(query.name_part, fits)
        if query.description_part:
            fits = self._descriptions.having(query.description_part, fits)
        return Run(_Picked(self.rows, fits), 0, len(fits))


class _Picked(Sequence[Backup]):
    """Some of the rows, by their numbers: only those that are asked for are looked at."""

    def __init__(self, rows: Sequence[Backup], numbers: Sequence[int]) -> None:
        self._rows = rows
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> Backup: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Backup]: ...
    def __getitem__(self, at: int | slice) -> Backup | Sequence[Backup]:
        if isinstance(at, slice):
            return [self._rows[number] for number in self._numbers[at]]
        return self._rows[self._numbers[at]]


def _before(rows: Sequence[Backup], time: int) -> int:
    """How many are newer than that."""
    return bisect_left(rows, -time, key=lambda row: -row.label.create_time)


_Index: TypeAlias = dict[Where, dict[str, Shelf]]  # the innermost key is the point


class Shelves:
    """All of them. A backup is on one of the common shelves, and on one of its VM's."""

    def __init__(self, newest_first: Iterable[Backup] = ()) -> None:
        self._all: _Index = {}
        self._by_vm: dict[str, _Index] = {}
        self._description = ""
        known: dict[tuple[str, str, str, str], tuple[Shelf, Shelf]] = {}
        for row in newest_first:
            kind = (row.cluster_uuid, row.label.namespace, row.point_uuid, row.label.vm_uuid)
            shelves = known.get(kind)
            if shelves is None:
                shelves = known[kind] = self._shelves_of(row)
            name, description = self._texts(row)
            for shelf in shelves:
                shelf.append(row, name, description)

    def add(self, row: Backup) -> None:
        name, description = self._texts(row)
        for shelf in self._shelves_of(row):
            shelf.add(row, name, description)

    def _shelves_of(self, row: Backup) -> tuple[Shelf, Shelf]:
        """The common one and its VM's, which are made if they are not there."""
        where, point = _where(row), row.point_uuid
        vm = self._by_vm.setdefault(row.label.vm_uuid, {})
        return (
            self._all.setdefault(where, {}).setdefault(point, Shelf()),
            vm.setdefault(where, {}).setdefault(point, Shelf()),
        )

    def _texts(self, row: Backup) -> tuple[str, str]:
        """Copies of name and description: those of neighbours lie side by side then, and looking
        through them need not go to where each row happens to be."""
        if self._description != row.label.description:  # the neighbour's will do, if it is the same
            self._description = _own(row.label.description)
        return _own(row.label.name), self._description

    def remove(self, row: Backup) -> None:
        """It has to be there, exactly so. What is empty then goes with it."""
        vm = self._by_vm[row.label.vm_uuid]
        for index in (self._all, vm):
            points = index[_where(row)]
            points[row.point_uuid].remove(place_of(row))
            if not points[row.point_uuid].rows:
                del points[row.point_uuid]
            if not points:
                del index[_where(row)]
        if not vm:
            del self._by_vm[row.label.vm_uuid]

    def find(self, where: Sequence[Where], query: BackupQuery) -> dict[Where, list[Run]]:
        """What the query's filters leave of the backups that stand there."""
        index = self._by_vm.get(query.vm_uuid, {}) if query.vm_uuid else self._all
        return {
            one: [shelf.found(query) for shelf in _at(index.get(one, {}), query.point_uuid)]
            for one in where
        }

    def of_vm(self, cluster_uuid: str, point_uuid: str, vm_uuid: str) -> Iterator[Backup]:
        """A VM's backups in a cluster and on a point, newest first."""
        return _merged(self._by_vm.get(vm_uuid, {}), cluster_uuid, point_uuid)

    def of_point(self, cluster_uuid: str, point_uuid: str) -> Iterator[Backup]:
        """All backups of a cluster on a point, newest first."""
        return _merged(self._all, cluster_uuid, point_uuid)


def _merged(index: _Index, cluster_uuid: str, point_uuid: str) -> Iterator[Backup]:
    shelves = [
        shelf
        for (cluster, _), points in index.items()
        if cluster == cluster_uuid
        for shelf in _at(points, point_uuid)
    ]
    return heapq.merge(*(shelf.rows for shelf in shelves), key=place_of)


def place_of(row: Backup) -> Place:
    return (-row.label.create_time, row.uuid, row.cluster_uuid)


def length(runs: Iterable[Run]) -> int:
    return sum(run.last - run.first for run in runs)


def page_of(runs: Sequence[Run], skipped: int, count: int) -> list[Backup]:
    """`count` rows of all runs together, after the first `skipped`."""
    starts = _after(runs, skipped)
    rests = [
        run.rows[start : min(run.last, start + count)]
        for run, start in zip(runs, starts, strict=True)
    ]
    return list(islice(heapq.merge(*rests, key=place_of), count))


def _after(runs: Sequence[Run], skipped: int) -> list[int]:
    """Where each run goes on after the first `skipped` rows of all together.

    The middle of the widest window parts all the windows; the half that can't hold the answer goes.
    """
    first, last = [run.first for run in runs], [run.last for run in runs]
    while skipped and first != last:
        widest = max(range(len(runs)), key=lambda at: last[at] - first[at])
        middle = (first[widest] + last[widest]) // 2
        pivot = place_of(runs[widest].rows[middle])
        cuts = [
            bisect_left(run.rows, pivot, low, high, key=place_of)
            for run, low, high in zip(runs, first, last, strict=True)
        ]
        before = sum(cuts) - sum(first)
        if before >= skipped:
            last = cuts
            if before == skipped:
                return cuts
        else:  # the pivot is skipped, too: no row is twice in the runs
            first, skipped = cuts, skipped - before - 1
            first[widest] += 1
    return first


def _own(text: str) -> str:
    """A copy."""
    return text.encode(errors="surrogatepass").decode(errors="surrogatepass")


def _where(row: Backup) -> Where:
    return (row.cluster_uuid, row.label.namespace)


def _at(points: dict[str, Shelf], point_uuid: str) -> list[Shelf]:
    if not point_uuid:
        return list(points.values())
    return [points[point_uuid]] if point_uuid in points else []
