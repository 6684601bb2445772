"""Reading chunks that nobody holds: they may go at any time, which is no sign of damage."""

from __future__ import annotations

import contextlib

import pytest

from storage.domain.appender import Appender
from storage.domain.domain import Domain
from storage.domain.reader import MAX_RUN_BYTES, ReadRun, plan_chunks
from tests.store import CHUNK, edited, image_of, mixed, patches, save


@pytest.fixture(autouse=True)
def _no_new_view(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Appender) -> None:
        raise AssertionError("makes the view anew")

    monkeypatch.setattr(Appender, "rebuild", refused)


def contents(domain: Domain, runs: list[ReadRun]) -> list[bytes]:
    buffer = memoryview(bytearray(MAX_RUN_BYTES + CHUNK + 4096))
    with contextlib.closing(domain.reader()) as reader:
        return [bytes(found) for run in runs for _, found in reader.read(run, buffer)]


def test_what_is_gone_when_it_is_planned_is_left_out(domain: Domain) -> None:
    one, other = image_of(1), image_of(2)
    saved = save(domain, one)
    save(domain, other)
    ids = [domain.hasher.full(chunk) for chunk in (one, other)]
    domain.forget([saved.backup])
    assert contents(domain, list(plan_chunks(domain, ids))) == [other]


def test_what_is_gone_when_it_is_read_is_left_out(domain: Domain) -> None:
    saved = save(domain, image_of(1))
    runs = list(plan_chunks(domain, [domain.hasher.full(image_of(1))]))
    domain.forget([saved.backup])
    domain.reclaim()
    assert contents(domain, runs) == []


def test_a_patch_that_is_gone_when_it_is_read_is_left_out(domain: Domain) -> None:
    """Its base stays."""
    (base,) = mixed(1)
    changed = edited(base, 3)
    first = save(domain, base)
    second = save(domain, changed, first)
    ids = [domain.hasher.full(chunk) for chunk in (base, changed)]
    assert patches(domain) == {ids[1]: ids[0]}
    runs = list(plan_chunks(domain, ids))
    domain.forget([second.backup])
    domain.reclaim()
    assert contents(domain, runs) == [base]
