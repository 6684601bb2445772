"""engine.catalogue.catalogue: what is known of backups, and how it follows the domains."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from engine.catalogue import catalogue as engine_catalogue
from engine.catalogue.catalogue import Catalogue
from engine.errors import NotFound
from engine.inventory.scopes import Range
from engine.model import (
    BACKUP_DONE,
    BACKUP_FAILED,
    BACKUP_RUNNING,
    Backup,
    BackupLabel,
    Cluster,
    Namespace,
)
from engine.state import State
from engine.verb_types import BackupQuery

HERE: list[Range] = [
    (Cluster(uuid="c", name="c"), Namespace(uuid="n", name="n", tenant="t")),
    (Cluster(uuid="c", name="c"), Namespace(uuid="m", name="m", tenant="t")),
]


def row(uuid: str, at: int = 0, *, status: int = BACKUP_DONE, **label: str) -> Backup:
    made = BackupLabel(
        vm_uuid=label.get("vm", "v"),
        vm_name="",
        tenant="t",
        tenant_name="",
        namespace=label.get("namespace", "n"),
        namespace_name="",
        name=label.get("name", uuid),
        description=label.get("description", ""),
        create_time=at,
        full=True,
        disks=(),
    )
    point, cluster = label.get("point", "p"), label.get("cluster", "c")
    return Backup(uuid=uuid, cluster_uuid=cluster, point_uuid=point, label=made, status=status)


def uuids(catalogue: Catalogue, query: BackupQuery | None = None) -> list[str]:
    return [found.uuid for found in catalogue.query(HERE, query or BackupQuery()).rows]


def test_newest_first_uuid_breaks_ties_and_pages_do_not_overlap(state: State) -> None:
    catalogue = Catalogue(state)
    rows = [row(f"u{n:03}", at=n // 7) for n in range(100)]
    random.Random(1).shuffle(rows)
    for one in rows:
        catalogue.put(one)
    expected = [
        one.uuid for one in sorted(rows, key=lambda one: (-one.label.create_time, one.uuid))
    ]
    pages = [uuids(catalogue, BackupQuery(page=n, page_size=30)) for n in (1, 2, 3, 4, 5)]
    assert [uuid for page in pages for uuid in page] == expected
    assert uuids(catalogue, BackupQuery(page=0, page_size=0)) == expected[:20]
    assert catalogue.query(HERE, BackupQuery(page_size=5000)).total == 100
    assert uuids(Catalogue(state), BackupQuery(page_size=1000)) == expected


def test_filters(state: State) -> None:
    catalogue = Catalogue(state)
    catalogue.put(row("a", 10, vm="v1", name="Nightly", description="by plan"))
    catalogue.put(row("b", 20, vm="v2", name="nightly", point="q"))
    catalogue.put(row("c", 30, vm="v1", namespace="m"))
    catalogue.put(row("d", 40, namespace="elsewhere"))
    assert uuids(catalogue) == ["c", "b", "a"]
    assert uuids(catalogue, BackupQuery(vm_uuid="v1")) == ["c", "a"]
    assert uuids(catalogue, BackupQuery(name_part="ightly")) == ["b", "a"]
    assert uuids(catalogue, BackupQuery(name_part="Night")) == ["a"]
    assert uuids(catalogue, BackupQuery(description_part="plan")) == ["a"]
    assert uuids(catalogue, BackupQuery(point_uuid="q")) == ["b"]
    assert uuids(catalogue, BackupQuery(start_time=20, end_time=30)) == ["c", "b"]
    assert uuids(catalogue, BackupQuery(start_time=21)) == ["c"]
    page = catalogue.query(HERE, BackupQuery(page_size=1))
    assert [state.total for state in page.ranges] == [2, 1]
    assert page.total == 3


def test_one_uuid_may_be_in_two_clusters(state: State) -> None:
    catalogue = Catalogue(state)
    catalogue.put(row("a"))
    catalogue.put(row("a", cluster="other"))
    assert catalogue.get("a", "other").cluster_uuid == "other"
    catalogue.remove(row("a"))
    assert catalogue.get("a").cluster_uuid == "other"
    with pytest.raises(NotFound):
        catalogue.get("a", "c")


def test_the_newest_is_the_last_that_came_of_those_finished(state: State) -> None:
    catalogue = Catalogue(state)
    assert catalogue.newest("c", "p", "v") is None
    for one in (
        row("z", 10),
        row("a", 10),
        row("running", 11, status=BACKUP_RUNNING),
        row("failed", 12, status=BACKUP_FAILED),
        row("there", 13, point="q"),
        row("theirs", 14, cluster="other"),
        row("other", 15, vm="w"),
    ):
        catalogue.put(one)
    newest = catalogue.newest("c", "p", "v")
    assert newest is not None
    assert newest.uuid == "a"


def test_the_newest_is_what_was_committed_last_after_a_restart_and_by_any_clock(
    state: State,
) -> None:
    catalogue = Catalogue(state)
    ahead, then = replace(row("a", 99), seq=3), replace(row("z", 10), seq=4)
    imported = [replace(row("m", 9), seq=5), replace(row("l", 8), seq=5)]

    def newest(catalogue: Catalogue) -> str:
        found = catalogue.newest("c", "p", "v")
        return found.uuid if found else ""

    catalogue.put_all([ahead, then])
    for now in (catalogue, Catalogue(state)):
        now.sync("c", "p", ["a", "z"], lambda: [ahead, then])
        assert newest(now) == "z"
    catalogue.put(row("b", 10))
    assert newest(catalogue) == "b"
    catalogue.put(replace(row("b", 10), seq=2))
    catalogue.put_all(imported)
    assert newest(catalogue) == "m"


def test_the_newest_of_each_vm(state: State) -> None:
    catalogue = Catalogue(state)
    for one in (
        row("old", 1, vm="v1"),
        row("new", 2, vm="v1"),
        row("failed", 3, vm="v1", status=BACKUP_FAILED),
        row("second", 4, vm="v2", namespace="m"),
        row("third", 5, vm="v3"),
        row("there", 6, vm="v4", point="q"),
    ):
        catalogue.put(one)
    assert [one.uuid for one in catalogue.newest_of_each("c", "p", 9)] == ["third", "second", "new"]
    assert [one.uuid for one in catalogue.newest_of_each("c", "p", 2)] == ["third", "second"]


def test_sync_follows_the_domain(state: State) -> None:
    catalogue = Catalogue(state)
    for one in (
        row("stays", 1),
        row("gone", 2),
        row("done after all", 3, status=BACKUP_FAILED),
        row("failed", 4, status=BACKUP_FAILED),
        row("running", 5, status=BACKUP_RUNNING),
        row("committing", 6, status=BACKUP_RUNNING),
        row("elsewhere", 7, point="q"),
    ):
        catalogue.put(one)
    there = [row("stays", 1), row("done after all", 3), row("committing", 6), row("new", 8)]
    only = catalogue.uuids("c", "p") | {one.uuid for one in there}
    assert "elsewhere" not in only
    catalogue.sync("c", "p", only, lambda: there)
    known = {one.uuid: one.status for one in catalogue.query(HERE, BackupQuery()).rows}
    assert known == {
        "stays": BACKUP_DONE,
        "done after all": BACKUP_DONE,
        "failed": BACKUP_FAILED,
        "running": BACKUP_RUNNING,
        "committing": BACKUP_RUNNING,
        "elsewhere": BACKUP_DONE,
        "new": BACKUP_DONE,
    }
    assert {one.uuid for one in Catalogue(state).query(HERE, BackupQuery()).rows} == set(known)


def test_sync_reads_again_when_something_changed_meanwhile(state: State) -> None:
    catalogue = Catalogue(state)
    catalogue.put(row("deleted"))
    reads: list[list[Backup]] = []

    def read() -> list[Backup]:
        if not reads:
            reads.append([row("deleted")])
            # Between what was read and what is applied, one goes and one comes.
            catalogue.remove(row("deleted"))
            catalogue.put(row("made"))
        else:
            reads.append([row("made")])
        return reads[-1]

    catalogue.sync("c", "p", ["deleted", "made"], read)
    assert uuids(catalogue) == ["made"]
    assert len(reads) == 2


def test_a_restart_fails_what_was_running(state: State) -> None:
    catalogue = Catalogue(state)
    running = row("a", status=BACKUP_RUNNING)
    catalogue.put(running)
    catalogue.put(row("b"))
    again = Catalogue(state)
    again.fail_running("reason")
    assert again.get("a") == replace(running, status=BACKUP_FAILED, error="reason")
    assert again.get("b").status == BACKUP_DONE
    assert Catalogue(state).get("a").error == "reason"


def test_the_newest_of_those_that_failed_stay(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By when they came: a clock that was ahead, or is behind, hides none that just failed."""
    monkeypatch.setattr(engine_catalogue, "KEPT_FAILED", 2)
    catalogue = Catalogue(state)
    others = [row("done", 1), row("runs", 2, status=BACKUP_RUNNING)]
    others += [row("a", 3, vm="w", status=BACKUP_FAILED)]
    others += [row("b", 3, point="q", status=BACKUP_FAILED)]
    catalogue.put_all(others)
    for uuid, at in (("first", 9), ("second", 8), ("third", 7)):
        catalogue.put(row(uuid, at, status=BACKUP_RUNNING))
        catalogue.put(row(uuid, at, status=BACKUP_FAILED))
    kept = {"second", "third", *(one.uuid for one in others)}
    assert set(uuids(catalogue)) == kept
    catalogue.put(row("third", 7, status=BACKUP_FAILED))
    assert set(uuids(catalogue)) == set(uuids(Catalogue(state))) == kept


def test_points_and_clusters_that_are_no_longer_ours_go(state: State) -> None:
    catalogue = Catalogue(state)
    for one in (row("a"), row("b", point="q"), row("c", cluster="other")):
        catalogue.put(one)
    catalogue.keep_only(["c"], ["p"])
    assert uuids(catalogue) == ["a"]
    assert catalogue.count("p") == 1
    catalogue.remove_point("p")
    assert state.backups.values() == []
