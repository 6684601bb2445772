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
from storage.view.trust import Trust

PATIENCE_S = 20.0


Looks = Callable[[], dict[str, frozenset[bytes] | None]]


class Found(Trust):
    """What is withdrawn, as each look in turn tells it."""

    def __init__(self, *looks: Looks) -> None:
        self._keeping = threading.Lock()
        self._looks = list(looks)

    def withdrawn(self) -> dict[str, frozenset[bytes] | None]:
        return self._looks.pop(0)()


def remember(state: State, trust: Trust) -> None:
    points = SimpleNamespace(domain=lambda *_: SimpleNamespace(trust=trust))
    remember_distrusted(state, cast(Points, points), "p", ("c",))


def packs(state: State) -> list[str]:
    return [row.pack for row in state.distrusts.values()]


def test_what_was_healed_is_forgotten(state: State) -> None:
    trust = Found(lambda: {"one": None, "two": None}, lambda: {"two": None})
    remember(state, trust)
    remember(state, trust)
    assert packs(state) == ["two"]


def test_what_is_found_by_two_at_once_is_all_kept(state: State) -> None:
    def looks() -> dict[str, frozenset[bytes] | None]:
        second.start()
        second.join(0.2)
        return {"one": None}

    trust = Found(looks, lambda: {"one": None, "two": None})
    second = threading.Thread(target=remember, args=(state, trust))
    remember(state, trust)
    second.join(PATIENCE_S)
    assert packs(state) == ["one", "two"]


def test_a_state_that_is_full_keeps_no_job_from_its_end(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise PointFull("state is full")

    trust = Found(lambda: {"one": None}, lambda: {"one": None})
    with monkeypatch.context() as patch:
        patch.setattr(state.distrusts, "put_in", full)
        remember(state, trust)
    assert packs(state) == []
    remember(state, trust)
    assert packs(state) == ["one"]
