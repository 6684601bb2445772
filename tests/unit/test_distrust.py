"""engine.points.distrust: what was found damaged is kept, whoever finds more at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from engine.points.distrust import remember_distrusted
from engine.points.points import Points
from engine.state import State
from storage.errors import PointFull

PATIENCE_S = 20.0


def points_with(withdrawn: Callable[[], dict[str, None]]) -> Points:
    """Each with a domain that distrusts these packs."""
    domain = SimpleNamespace(trust=SimpleNamespace(withdrawn=withdrawn))
    return cast(Points, SimpleNamespace(domain=lambda *_: domain))


def remember(state: State, withdrawn: Callable[[], dict[str, None]]) -> None:
    remember_distrusted(state, points_with(withdrawn), "p", ("c",))


def packs(state: State) -> list[str]:
    return [row.pack for row in state.distrusts.values()]


def test_what_was_healed_is_forgotten(state: State) -> None:
    remember(state, lambda: {"one": None, "two": None})
    remember(state, lambda: {"two": None})
    assert packs(state) == ["two"]


def test_what_is_found_by_two_at_once_is_all_kept(state: State) -> None:
    second = threading.Thread(target=remember, args=(state, lambda: {"one": None, "two": None}))

    def looks() -> dict[str, None]:
        second.start()
        second.join(0.2)
        return {"one": None}

    remember(state, looks)
    second.join(PATIENCE_S)
    assert packs(state) == ["one", "two"]


def test_a_state_that_is_full_keeps_no_job_from_its_end(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise PointFull("state is full")

    with monkeypatch.context() as patch:
        patch.setattr(state.distrusts, "put_in", full)
        remember(state, lambda: {"one": None})
    assert packs(state) == []
    remember(state, lambda: {"one": None})
    assert packs(state) == ["one"]
