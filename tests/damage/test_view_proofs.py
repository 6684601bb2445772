"""Each proof of the view by itself: what it is there for and no other would notice.

Read first: docs/design.md §8.1. tests/damage/test_view_damage.py has them all at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from storage.domain import orphans
from storage.errors import ViewDamaged
from storage.files.fs import OsFs
from storage.format.chunks import ZERO_MARK
from storage.format.manifests import encode_page
from storage.format.paths import DomainPaths, FileContents
from storage.lmdb_env.pages import _Walk, require_sound_pages
from storage.view.index import Index
from storage.view.lmdb_tables import LmdbTables
from storage.view.tables import page_key
from storage.view.view import View
from tests.damage.site import Site

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
LAYER, CHILD = 3, 4


def lose(state: LmdbTables, name: str, key: bytes) -> None:
    """LMDB does not come upon the row any more; its pages are sound."""
    table = state.table(name)
    assert table._txn.delete(key, db=table._db)


def test_a_view_that_was_not_closed_is_proved_row_by_row(tmp_path: Path) -> None:
    """A lost row leaves pages that are as sound as any."""
    view = View(str(tmp_path / "view"), b"mine")
    view.update(lambda state: state.table("chunks").put(b"a", b"row"))
    view.update(lambda state: lose(state, "chunks", b"a"))
    view.close()
    require_sound_pages(str(tmp_path / "view" / "data.mdb"))
    with pytest.raises(ViewDamaged, match="rows are missing"):
        View(str(tmp_path / "view"), b"mine")


def test_a_page_in_another_ones_place_is_told_by_its_number(tmp_path: Path) -> None:
    """Though it is of the right kind, and its nodes fill it."""
    view = View(str(tmp_path / "view"), b"mine")
    view.update(lambda state: state.table("chunks").put(b"a", b"row"))
    view.close()
    path = tmp_path / "view" / "data.mdb"
    with path.open("r+b") as file:
        _, main = _Walk(file.fileno())._newest_state()
        file.seek(main.root * PAGE_BYTES)
        file.write((main.root + 1).to_bytes(8, "little"))
    with pytest.raises(ViewDamaged, match=f"page {main.root} says that it is page"):
        require_sound_pages(str(path))


def drop(index: Index) -> None:
    index.merge_layer(CHILD, [], root=False)


def merge(index: Index) -> None:
    index.merge_layer(LAYER, [CHILD], root=False)


@pytest.mark.parametrize("empty", [drop, merge])
def test_a_layer_is_emptied_only_of_all_its_pages(
    tmp_path: Path, empty: Callable[[Index], None]
) -> None:
    """One that is not found would leave its chunks' references, or its entries, behind."""
    contents = FileContents(OsFs(), DomainPaths(str(tmp_path), "domain"))
    view = View(str(tmp_path / "view"), b"mine")

    def fill(state: LmdbTables) -> None:
        for layer in (LAYER, CHILD):
            for page_no in range(3):
                state.table("pages").put(page_key(layer, page_no), encode_page({0: ZERO_MARK}))

    view.update(fill)
    view.update(lambda state: lose(state, "pages", page_key(CHILD, 1)))
    with pytest.raises(ViewDamaged):
        view.update(lambda state: empty(Index(state, contents)))
    view.close()


@pytest.mark.parametrize("name", ["packs", "manifests", "sessions"])
def test_a_sweep_does_not_believe_that_a_row_is_absent(own: Site, name: str) -> None:
    with own.opened() as domain:
        domain.begin("backup").adopt_pack(str(own.files()["packs"][0]))
        files = own.files()
        with domain.view.read() as state:
            keys = [key for key, _ in state.table(name).scan()]
        assert keys
        for key in keys:
            domain.view.update(partial(lose, name=name, key=key))
        assert orphans.sweep(domain) == 0
        assert own.files() == files
        with domain.view.read() as state:
            assert [key for key, _ in state.table(name).scan()] == keys
