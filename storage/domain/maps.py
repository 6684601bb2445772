"""A disk backup's complete map: its layer over its parents' layers, a page at a time.

So a backup deep in a chain costs a few more page look-ups than a full one, and memory is one page.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from functools import partial

from storage.errors import Damaged, NotOnPoint
from storage.format.chunks import ZERO_MARK
from storage.format.manifests import decode_page
from storage.view import tables
from storage.view.tables import LOST_LAYER, Tables
from storage.view.view import View

PAGES_PER_READ = 64


class DiskMap:
    """Chunk index → chunk id of one disk backup. Any thread. Valid while the backup is held.

    When a parent is released meanwhile, its layer has become part of this disk's own: so the
    chain is looked up anew in every transaction.
    """

    def __init__(self, view: View, disk: str, capacity: int, chunk_size: int) -> None:
        self._view = view
        self._disk = disk
        self.capacity = capacity
        self.chunk_size = chunk_size

    @classmethod
    def of(cls, view: View, disk: str, chunk_size: int) -> DiskMap:
        """NotOnPoint when there is no such disk backup; Damaged when its map can't be read.

        Reads its layers as a whole: a page that the view has lost would read as zeros.
        """

        def found(state: Tables) -> DiskMap:
            row = tables.disks.get(state, disk)
            if row is None:
                raise NotOnPoint(f"disk backup {disk} is not on the point")
            made = cls(view, disk, row.capacity, chunk_size)
            for layer in made._layers(state):
                tables.read_layer(state, layer)
            return made

        return view.ask(found)

    def page(self, page_no: int) -> dict[int, bytes]:
        """Index in the page → chunk id. What is absent reads as zeros."""
        return self._view.ask(lambda state: _merged(state, self._layers(state), page_no))

    def pages(self) -> Iterator[tuple[int, dict[int, bytes]]]:
        """(page number, page) of all pages that are not all zeros, ascending."""
        after = -1
        while True:
            found = self._view.ask(partial(self._next_pages, after))
            if not found:
                return
            yield from ((no, page) for no, page in found if page)
            after = found[-1][0]

    def _next_pages(self, after: int, state: Tables) -> list[tuple[int, dict[int, bytes]]]:
        layers = self._layers(state)
        page_nos = _page_nos(state, layers, after, PAGES_PER_READ)
        return [(no, _merged(state, layers, no)) for no in page_nos]

    def _layers(self, state: Tables) -> list[int]:
        """The layers that make the disk up, oldest first."""
        layers = []
        disk = self._disk
        while disk:
            row = tables.disks.get(state, disk)
            if row is None:
                raise NotOnPoint(f"disk backup {self._disk} is not on the point any more")
            if row.layer == LOST_LAYER:
                raise Damaged(
                    f"disk backup {self._disk}: manifest {row.manifest} is damaged or gone, "
                    "or one that it builds on"
                )
            layers.append(row.layer)
            disk = row.parent
        return layers[::-1]


def _merged(state: Tables, layers: list[int], page_no: int) -> dict[int, bytes]:
    merged: dict[int, bytes] = {}
    pages = state.table("pages")
    found = pages.get_many([tables.page_key(layer, page_no) for layer in layers])
    for layer in layers:
        page = found.get(tables.page_key(layer, page_no))
        if page is not None:
            merged.update(decode_page(page))
    if len(layers) > 1:
        merged = {at: chunk for at, chunk in merged.items() if chunk != ZERO_MARK}
    return merged


def _page_nos(state: Tables, layers: list[int], after: int, limit: int) -> list[int]:
    """The next `limit` page numbers above `after` that any of the layers has."""
    numbers: list[int] = []
    runs = [tables.layer_page_nos(state, layer, after + 1) for layer in layers]
    for number in heapq.merge(*runs):
        if numbers and numbers[-1] == number:
            continue
        if len(numbers) == limit:
            break
        numbers.append(number)
    return numbers
