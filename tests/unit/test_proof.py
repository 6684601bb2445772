"""storage.view.proof: a large view is proved now and then; what a proof called dead is retired."""

from __future__ import annotations

import os

import pytest

from storage.domain.domain import Domain
from storage.view import proof, tables
from storage.view.lmdb_tables import LmdbTables
from storage.view.memory_tables import MemoryTables
from storage.view.proof import REST, Proof
from tests.store import CHUNK, Saved, files, load, save


class Clock:
    """Stands still but for a second for each proof of a large view."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.proofs = 0
        prove = LmdbTables.prove

        def proved(state: LmdbTables) -> None:
            self.now_s += 1
            self.proofs += 1
            prove(state)

        monkeypatch.setattr(LmdbTables, "prove", proved)
        monkeypatch.setattr(proof, "QUICK_ROWS", 0)

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> Clock:
    ticking = Clock(monkeypatch)
    domain.proof = Proof(domain.view, ticking)
    return ticking


def saved(domain: Domain, count: int) -> list[Saved]:
    """Backups that have a pack each."""
    return [save(domain, os.urandom(CHUNK)) for _ in range(count)]


def packs(domain: Domain) -> int:
    return len(files(domain, "packs"))


def reclaimed(domain: Domain) -> int:
    return domain.reclaim(copy_budget_bytes=0).packs_removed


def test_large_views_are_proved_now_and_then(domain: Domain, clock: Clock) -> None:
    backups = saved(domain, 3)
    for backup, removed in zip(backups, (1, 0, 0), strict=True):
        domain.forget([backup.backup])
        assert reclaimed(domain) == removed
    clock.now_s += REST - 0.5
    assert (reclaimed(domain), clock.proofs, packs(domain)) == (0, 1, 2)
    clock.now_s += 1
    assert (reclaimed(domain), clock.proofs, packs(domain)) == (2, 2, 0)
    assert (reclaimed(domain), clock.proofs) == (0, 2)


def test_a_gc_that_was_asked_for_proves_at_once(domain: Domain, clock: Clock) -> None:
    for backup in saved(domain, 2):
        domain.forget([backup.backup])
        assert domain.reclaim().packs_removed == 1
    assert clock.now_s >= 2


def test_what_was_proved_dead_goes_without_another_proof(domain: Domain, clock: Clock) -> None:
    """As when the gc that made the proof was cancelled, or did not reach the point."""
    first, second = saved(domain, 2)
    domain.forget([first.backup])
    dead = domain.dead_packs(at_once=False)
    domain.forget([second.backup])
    assert reclaimed(domain) == len(dead) == 1
    assert (clock.proofs, packs(domain)) == (1, 1)


def test_small_views_are_proved_at_once(
    domain: Domain, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "QUICK_ROWS", 1000)
    for backup in saved(domain, 2):
        domain.forget([backup.backup])
        assert reclaimed(domain) == 1
    assert clock.proofs == 2


def test_nothing_is_retired_on_an_unproved_word(domain: Domain, clock: Clock) -> None:
    """A live pack's row calls it dead while the view rests: it stays, and the next proof mends."""
    gone, kept = save(domain, os.urandom(CHUNK)), save(domain, b"kept" * CHUNK)
    domain.forget([gone.backup])
    assert reclaimed(domain) == 1
    counts = domain._tally._counts
    assert counts is not None
    counts.dead |= {pack for pack, _ in domain.view.ask(rows_of)}
    domain.view.update(call_packs_dead)
    assert domain.has_dead_packs()
    assert reclaimed(domain) == 0
    clock.now_s += REST + 1
    assert reclaimed(domain) == 0
    assert load(domain, kept) == b"kept" * CHUNK
    assert not domain.has_dead_packs()


def rows_of(state: LmdbTables) -> list[tuple[str, tables.PackState]]:
    return list(tables.packs.scan(state))


def call_packs_dead(state: LmdbTables) -> None:
    rows = rows_of(state)
    before = MemoryTables()
    for pack, row in rows:
        fields = row.number, row.size_bytes, row.count, row.digest
        tables.packs.put(before, pack, tables.PackState(*fields))
    table = state.table("packs")
    for key, value in before.table("packs").scan():
        table._txn.put(key, table.with_check(key, value), db=table._db)
