"""storage.view.tally: the counts in memory are those of a scan; no changed backup is overlooked."""

from __future__ import annotations

import random
from pathlib import Path

from storage.domain.domain import Domain
from storage.view import tables
from storage.view.tally import Tally
from tests.store import Saved, cluster, image_of, mixed, new_point, open_domain, save


def scanned(domain: Domain) -> object:
    """The counts of somebody who has noticed nothing."""
    return Tally().counts(domain.view)


def shown(domain: Domain) -> dict[str, object]:
    return {row.backup: row for row in domain.backups()}


def packs(domain: Domain) -> list[str]:
    with domain.view.read() as state:
        return [pack for pack, _ in tables.packs.scan(state)]


def test_the_counts_follow_everything_that_two_hosts_do(tmp_path: Path) -> None:
    point, label, chance = new_point(tmp_path), cluster(), random.Random(5)
    one, two = open_domain(point, label), open_domain(point, label, "host-2")
    saved: list[Saved] = []
    told, known, seq = 0, shown(one), one.refresh()
    for _ in range(60):
        who = chance.choice((one, two))
        act = chance.choice(("full", "incremental", "forget", "forget", "gc", "rebuild"))
        if act == "forget" and saved:
            who.forget([saved.pop(chance.randrange(len(saved))).backup])
        elif act == "gc":
            who.reclaim(copy_budget_bytes=chance.choice((0, 1 << 30)))
        elif act == "rebuild":
            who.rebuild()
        elif act != "forget":
            base = chance.choice(saved) if saved and act == "incremental" else None
            image = image_of(*chance.choices([*range(9), *mixed(2)], k=4))
            saved.append(save(who, image, base))
        for domain in (one, two):
            domain.refresh()
            assert domain.stats().packs == len(packs(domain))
            assert domain._tally.counts(domain.view) == scanned(domain)
        if chance.random() < 0.5:
            last = one.refresh()
            changed = one.changed_backups(seq)
            after = shown(one)
            if changed is not None:
                told += len(changed)
                differ = {uuid for uuid, _ in known.items() ^ after.items()}
                assert differ <= changed
                assert {row.backup for row in one.rows_of(changed)} == changed & after.keys()
            known, seq = after, last
    assert told > 10


def test_what_was_long_ago_is_not_known(tmp_path: Path) -> None:
    point, label = new_point(tmp_path), cluster()
    domain = open_domain(point, label)
    first = save(domain, image_of(1))
    assert domain.changed_backups(domain.refresh()) == frozenset()
    assert domain.changed_backups(0) == frozenset({first.backup})
    domain.close()
    again = open_domain(point, label)
    assert again.changed_backups(0) is None
    seq = again.refresh()
    again.rebuild()
    assert again.changed_backups(seq) is None
