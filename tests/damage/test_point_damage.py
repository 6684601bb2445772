"""Bytes and files of a point, damaged at seeded places, one at a time.

Whatever is damaged: it is detected and named (the file, a chunk's place, who loses by it), nothing
wrong comes back, and all that the checker does not list as lost can still be read. More places:
VMKEEP_DAMAGE=20000 pytest tests/damage.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest

from storage.check.check import CheckReport, check_point
from storage.errors import Damaged, StorageError
from storage.files.fs import OsFs
from storage.format.chunks import FRAME_HEADER_BYTES
from storage.format.packs import read_footer
from tests.damage import site as sites
from tests.damage.site import Site, damaged, readable

PLACES = int(os.environ.get("VMKEEP_DAMAGE", "2000"))
SHARES = 8  # of the places, a test each
WEIGHTS = {
    "POINT": 1,
    "DOMAIN": 1,
    "log": 3,
    "packs": 7,
    "manifests": 5,
    "checkpoints": 1,
    "bundles": 2,
    "hosts": 1,
}


def test_the_site_is_sound(site: Site) -> None:
    report = check_point(str(site.path), deep=True)
    assert (report.findings, report.disks, report.backups) == ([], [], 5)
    with site.opened() as domain:
        assert [readable(domain, image) for image in site.images] == [[], [], [], []]


@pytest.mark.parametrize("share", range(SHARES))
def test_every_damage_is_found_and_nothing_wrong_comes_back(site: Site, share: int) -> None:
    chance = random.Random(f"damage {share}")
    files = site.files()
    tried: Counter[str] = Counter()
    frames = 0
    while tried.total() < PLACES // SHARES:
        (kind,) = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))
        path = chance.choice(files[kind])
        way = chance.choice(sites.WAYS)
        content = path.read_bytes()
        other = chance.choice(files[kind]).read_bytes()
        changed = way(chance, content, other)
        if changed == content:
            continue
        tried[kind] += 1
        what = f"{way.__name__} {path.relative_to(site.path)}"
        place = frame_with_all(path, content, changed) if kind == "packs" else -1
        frames += place >= 0
        with damaged(path, changed):
            try:
                _judge(site, kind, path, place, anew=chance.random() < 0.5)
            except Exception as error:
                error.add_note(f"share {share}, place {tried.total()}: {what}")
                raise
    print(f"damaged and found: {dict(tried)}, in one frame: {frames}")
    assert frames > PLACES // SHARES // 20


def frame_with_all(path: Path, content: bytes, changed: bytes | None) -> int:
    """Where the frame is that all changed bytes of a pack lie in; -1: they don't."""
    if changed is None or len(changed) != len(content):
        return -1
    changes = [at for at, (old, new) in enumerate(zip(content, changed, strict=True)) if old != new]
    for entry in read_footer(OsFs(), str(path))[1]:
        end = entry.offset + FRAME_HEADER_BYTES + entry.stored_len
        if entry.offset <= changes[0] and changes[-1] < end:
            return entry.offset
    return -1


def _judge(site: Site, kind: str, path: Path, place: int, *, anew: bool) -> None:
    if kind == "POINT":
        with pytest.raises(StorageError, match=str(site.path)):
            check_point(str(site.path), deep=True)
        return
    report = check_point(str(site.path), deep=True)
    if kind == "log" and not path.exists() and path == site.last_record:
        # Nothing on the point tells that a last record was there; who has seen it does.
        with pytest.raises(Damaged, match="older state"), site.opened():
            pass
        return
    if kind in ("checkpoints", "bundles", "hosts"):
        # Nobody needs it: losing it whole is no loss, anything else is told.
        assert report.clean
        assert {found.path for found in report.findings} == (
            {str(path)} if path.exists() else set()
        )
    else:
        assert not report.clean
        named = [found for found in report.findings if str(path) in f"{found.path} {found.detail}"]
        assert named or kind == "log", report.findings
        if place >= 0:
            chunks = [found for found in named if found.offset == place]
            assert chunks, report.findings
            losers = {disk.backup for disk in report.disks}
            assert losers
            assert losers <= {name for found in chunks for name in found.backups}
    _judge_reading(site, kind, report, anew=anew)


def _judge_reading(site: Site, kind: str, report: CheckReport, *, anew: bool) -> None:
    """Through the view that was there before, or one made of what is left."""
    if anew:
        site.forget_view()
    lost = {disk.disk: disk for disk in report.disks}
    try:
        with site.opened() as domain:
            for image in site.images:
                holes = readable(domain, image)
                told = lost.get(image.saved.disk)
                allowed = told.ranges if told else ()
                for at, length in holes:
                    assert any(a <= at and at + length <= a + n for a, n in allowed), "not told"
    except StorageError:
        assert kind == "log", "the domain could not be opened"
    finally:
        site.restore_view()
