"""storage.format.bundles: one is read for its records only if it is what the log says; else it
costs time, and nothing else."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import msgspec
import pytest

from storage.check.check import check_point
from storage.domain.bundling import Bundling
from storage.domain.domain import Domain
from storage.errors import Damaged
from storage.files.fs import OsFs, Room
from storage.format import bundles
from storage.format.record import Record, record_digest
from storage.log.log import record_path
from storage.point import ClusterLabel, Point
from tests import forging
from tests.failing_fs import FailingFs
from tests.store import Saved, cluster, dump, image_of, load, new_uuid, open_domain, save

PER_BUNDLE = 4
LAST = 10  # two records a backup: 1 to 3, 4 to 7, and three that fill no bundle


@pytest.fixture(autouse=True)
def _few_records_a_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "RECORDS_PER_BUNDLE", PER_BUNDLE)


@pytest.fixture
def saved(domain: Domain) -> list[Saved]:
    return [save(domain, image_of(number + 1), label=b"%d" % number) for number in range(5)]


@pytest.fixture
def bundled(domain: Domain, saved: list[Saved]) -> list[Saved]:
    assert Bundling().go_on(domain) == 2
    return saved


class ReadsNoted(OsFs):
    def __init__(self) -> None:
        self.opened: list[str] = []

    def open_read(self, path: str) -> int:
        self.opened.append(path)
        return super().open_read(path)


def record(domain: Domain, seq: int) -> Path:
    return Path(domain.paths.log, record_path(seq))


def bundle_at(domain: Domain, first: int) -> Path:
    return Path(f"{record(domain, first)}.bundle")


def names(domain: Domain) -> list[str]:
    return sorted(path.name for path in Path(domain.paths.log).rglob("*.bundle"))


def listed(point: Point, domain: Domain) -> set[str]:
    """Read anew, as another cluster would."""
    fresh = Point.open(point.path)
    return {row.backup for row in fresh.foreign_backups(os.path.basename(domain.paths.root))}


def backups(saved: list[Saved]) -> set[str]:
    return {one.backup for one in saved}


def encoded(records: list[bytes]) -> bytes:
    """A bundle by docs/design.md alone."""
    return forging.small_object(b"VKBU", msgspec.msgpack.encode(records))


def records_of(domain: Domain, first: int, last: int) -> list[bytes]:
    return [record(domain, seq).read_bytes() for seq in range(first, last + 1)]


def forged(body: bytes, previous: bytes | None = None) -> bytes:
    """A record like it, with other words in it, that is whole by itself."""
    truth = msgspec.msgpack.decode(body[12:-16], type=Record)
    lie = msgspec.structs.replace(truth, host="liar", previous=previous or truth.previous)
    return forging.small_object(b"VKRE", msgspec.msgpack.encode(lie))


def test_full_stretches_get_a_bundle_each_and_once(domain: Domain, bundled: list[Saved]) -> None:
    assert names(domain) == [f"{1:016x}.bundle", f"{4:016x}.bundle"]
    assert bundle_at(domain, 1).read_bytes() == encoded(records_of(domain, 1, 3))
    assert bundle_at(domain, 4).read_bytes() == encoded(records_of(domain, 4, 7))
    assert Bundling().go_on(domain) == 0
    assert len(bundled) == 5


def test_it_goes_on_where_it_was(domain: Domain, saved: list[Saved]) -> None:
    bundling = Bundling()
    with mock.patch("storage.domain.bundling.STRETCHES_PER_CALL", 1):
        assert [bundling.go_on(domain) for _ in range(3)] == [1, 1, 0]
    save(domain, image_of(9))
    assert bundling.go_on(domain) == 1
    assert names(domain)[-1] == f"{8:016x}.bundle"
    assert len(saved) == 5


def test_two_hosts_may_both_be_at_it(
    point: Point, label: ClusterLabel, domain: Domain, saved: list[Saved]
) -> None:
    other = open_domain(point, label, "host-2")
    path = bundle_at(domain, 1)
    with mock.patch.object(domain.records, "_is_there", return_value=False):
        assert Bundling().go_on(other) == 2
        before = path.read_bytes(), path.stat().st_ino
        assert Bundling().go_on(domain) == 0
    assert (path.read_bytes(), path.stat().st_ino) == before
    assert listed(point, domain) == backups(saved)


def test_who_reads_from_the_start_opens_bundles(
    point: Point, domain: Domain, bundled: list[Saved]
) -> None:
    noting = ReadsNoted()
    fresh = Point.open(point.path, fs=noting)
    found = fresh.foreign_backups(os.path.basename(domain.paths.root))
    assert {row.backup: row.label for row in found} == {
        one.backup: b"%d" % number for number, one in enumerate(bundled)
    }
    opened = [path for path in noting.opened if path.startswith(domain.paths.log)]
    proofs = [str(record(domain, 3)), str(record(domain, 7))]
    tail = [str(record(domain, seq)) for seq in range(8, LAST + 2)]
    assert [path for path in opened if not path.endswith(".bundle")] == [*proofs, *tail]


def test_who_has_read_some_goes_on_in_the_middle_of_one(
    point: Point, domain: Domain, label: ClusterLabel
) -> None:
    fresh = Point.open(point.path)
    kept = [save(domain, image_of(1)), save(domain, image_of(2))]
    assert {row.backup for row in fresh.foreign_backups(label.cluster_uuid)} == backups(kept)
    kept += [save(domain, image_of(number)) for number in range(3, 6)]
    domain.forget([kept[0].backup])
    assert Bundling().go_on(domain) == 3
    record(domain, 5).rename(record(domain, 5).with_suffix(".away"))  # only its bundle has it
    found = {row.backup for row in fresh.foreign_backups(label.cluster_uuid)}
    assert found == backups(kept[1:])


def test_a_view_is_the_same_when_it_is_made_from_bundles(
    domain: Domain, bundled: list[Saved]
) -> None:
    before = dump(domain)
    domain.rebuild()
    assert dump(domain) == before
    assert [load(domain, one) for one in bundled] == [image_of(n + 1) for n in range(5)]


def test_a_record_that_can_not_be_read_is_taken_from_its_bundle(
    point: Point, domain: Domain, bundled: list[Saved]
) -> None:
    record(domain, 5).write_bytes(b"")
    before = dump(domain)
    domain.rebuild()
    assert dump(domain) == before
    assert listed(point, domain) == backups(bundled)
    report = check_point(point.path, deep=True)
    assert "log" in {finding.kind for finding in report.findings}


@pytest.mark.parametrize("checkpoint_after", [0, 1, 2], ids=["no checkpoint", "before", "after"])
def test_a_host_that_comes_takes_a_record_that_can_not_be_read_from_its_bundle(
    point: Point, label: ClusterLabel, domain: Domain, checkpoint_after: int
) -> None:
    """Though it looks for records of its own, and for those that announce a checkpoint."""
    kept = []
    for number in range(4):
        kept.append(save(domain, image_of(number + 1)))
        if number + 1 == checkpoint_after:
            domain.checkpoint()
    assert Bundling().go_on(domain) == 2
    record(domain, 4 if checkpoint_after == 2 else 5).write_bytes(b"")
    other = open_domain(point, label, "host-2")
    assert dump(other) == dump(domain)
    assert [load(other, one) for one in kept] == [image_of(n + 1) for n in range(4)]


Harm = Callable[[Domain], bytes]

HARMS: dict[str, Harm] = {
    "empty": lambda _: b"",
    "of another kind": lambda domain: record(domain, 4).read_bytes(),
    "newer": lambda domain: forging.small_object(
        b"VKBU", msgspec.msgpack.encode(records_of(domain, 4, 7)), version=2
    ),
    "no list": lambda _: forging.small_object(b"VKBU", msgspec.msgpack.encode({"a": 1})),
    "nested": lambda _: forging.small_object(b"VKBU", b"\x91" * 100_000),
    "no records": lambda _: encoded([b"", b"x", b"y", b"z"]),
    "one too few": lambda domain: encoded(records_of(domain, 4, 6)),
    "the last alone": lambda domain: encoded(records_of(domain, 7, 7)),
    "one too many": lambda domain: encoded(records_of(domain, 4, 8)),
    "the stretch before": lambda domain: encoded(records_of(domain, 1, 3)),
    "others before the last": lambda domain: encoded(
        records_of(domain, 1, 3) + records_of(domain, 7, 7)
    ),
    "turned round": lambda domain: encoded([records_of(domain, 4, 7)[at] for at in (1, 0, 2, 3)]),
    "a lie at its start": lambda domain: encoded(
        [forged(record(domain, 4).read_bytes()), *records_of(domain, 5, 7)]
    ),
    "a lie at its end": lambda domain: encoded(
        [*records_of(domain, 4, 6), forged(record(domain, 7).read_bytes())]
    ),
}


def _a_chain_of_lies(domain: Domain) -> bytes:
    """Each follows the one before; only the log knows better."""
    lies: list[bytes] = []
    for body in records_of(domain, 4, 7):
        lies.append(forged(body, record_digest(lies[-1]) if lies else None))
    return encoded(lies)


HARMS["a chain of lies"] = _a_chain_of_lies


def expect_harmless(point: Point, domain: Domain, kept: list[Saved]) -> None:
    """Everybody still reads what the log says, and the check says which bundle is none."""
    assert listed(point, domain) == backups(kept)
    before = dump(domain)
    domain.rebuild()
    assert dump(domain) == before
    report = check_point(point.path, deep=True)
    assert report.clean
    assert [(one.kind, one.path) for one in report.findings] == [
        ("bundle", str(bundle_at(domain, 4)))
    ]
    more = save(domain, image_of(77))
    assert listed(point, domain) == backups([*kept, more])


@pytest.mark.parametrize("harm", HARMS)
def test_one_that_does_not_hold_the_log(
    point: Point, domain: Domain, bundled: list[Saved], harm: str
) -> None:
    content = HARMS[harm](domain)
    assert content != bundle_at(domain, 4).read_bytes()
    bundle_at(domain, 4).write_bytes(content)
    expect_harmless(point, domain, bundled)


def test_one_of_another_domain(point: Point, domain: Domain, bundled: list[Saved]) -> None:
    other = open_domain(point, cluster("other"), "host-9")
    for number in range(5):
        save(other, image_of(number + 1))
    assert Bundling().go_on(other) == 2
    os.replace(bundle_at(other, 4), bundle_at(domain, 4))
    expect_harmless(point, domain, bundled)


def test_cut_off_or_flipped_anywhere(point: Point, domain: Domain, bundled: list[Saved]) -> None:
    path = bundle_at(domain, 4)
    whole = path.read_bytes()
    for at in range(0, len(whole), 31):
        path.write_bytes(whole[:at])
        assert listed(point, domain) == backups(bundled)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert listed(point, domain) == backups(bundled)


def test_one_whose_last_record_the_log_does_not_have(
    point: Point, domain: Domain, bundled: list[Saved]
) -> None:
    """As on a point that was put back to an older state, but for the bundle."""
    for seq in range(7, LAST + 1):
        record(domain, seq).unlink()
    assert listed(point, domain) == backups(bundled[:3])


@pytest.mark.usefixtures("bundled")
def test_a_record_that_is_another_one_in_the_log_is_not_hidden_by_one(
    point: Point, domain: Domain
) -> None:
    record(domain, 7).write_bytes(forged(record(domain, 7).read_bytes()))
    with pytest.raises(Damaged):
        listed(point, domain)


@pytest.mark.usefixtures("bundled")
def test_the_check_names_what_is_no_bundle(point: Point, domain: Domain) -> None:
    epoch = record(domain, 1).parent
    for name in ("x.bundle", f"{2:016x}.bundle", f"{99:016x}.bundle", f"{8:016x}.bundle"):
        (epoch / name).write_bytes(encoded(records_of(domain, 8, LAST)))
    report = check_point(point.path, deep=True)
    assert report.clean
    assert {one.kind for one in report.findings} == {"bundle"}
    assert len(report.findings) == 4
    assert check_point(point.path, deep=False).findings == []


def test_a_full_point_gets_none_and_tries_again(domain: Domain, saved: list[Saved]) -> None:
    bundling = Bundling()
    capacity = 1 << 40
    with mock.patch.object(domain.fs, "room", return_value=Room(capacity, 64 << 20)):
        assert bundling.go_on(domain) == 0
    assert names(domain) == []
    assert bundling.go_on(domain) == 2
    assert len(saved) == 5


@pytest.mark.parametrize("step", ["pwrite", "fsync", "close", "link"])
def test_a_call_that_fails_leaves_nothing_and_is_repeated(
    point: Point, label: ClusterLabel, step: str
) -> None:
    fs = FailingFs()
    domain = open_domain(Point.open(point.path, fs=fs), label)
    kept = [save(domain, image_of(number + 1)) for number in range(2)]
    bundling = Bundling()
    fs.fail = {step: errno.ENOSPC}
    assert bundling.go_on(domain) == 0
    fs.fail = {}
    assert names(domain) == []
    assert list(Path(domain.paths.host_tmp("host-1")).iterdir()) == []
    assert bundling.go_on(domain) == 1
    assert listed(point, domain) == backups(kept)


def test_records_too_large_for_one_stay_without(
    domain: Domain, point: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "RECORDS_LIMIT_BYTES", 4096)
    kept = [
        save(domain, image_of(number + 1), label=new_uuid().encode() * (200 if number == 0 else 1))
        for number in range(5)
    ]
    assert Bundling().go_on(domain) == 1
    assert names(domain) == [f"{4:016x}.bundle"]
    assert listed(point, domain) == backups(kept)


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize("gone", [False, True])
def test_a_record_that_can_not_be_read_keeps_only_its_stretch_from_being_bundled(
    domain: Domain, gone: bool
) -> None:
    """And the point from nothing: the view has folded it long ago."""
    content = bytearray(record(domain, 2).read_bytes())
    content[20] ^= 1
    if gone:
        record(domain, 2).unlink()
    else:
        record(domain, 2).write_bytes(content)
    bundling = Bundling()
    assert bundling.go_on(domain) == 1
    assert bundling.go_on(domain) == 0
    assert names(domain) == [f"{4:016x}.bundle"]
