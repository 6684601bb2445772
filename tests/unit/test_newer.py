"""What a newer vmkeep wrote into a domain is left as it is, and so is what only looks so."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.domain.domain import Domain
from storage.errors import PointNewerFormat
from storage.point import ClusterLabel, Point
from tests.forging import small_object
from tests.store import image_of, load, open_domain, save


def test_a_domain_with_a_newer_label_is_refused_and_not_touched(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    save(domain, image_of(1))
    domain.close()
    path = Path(domain.paths.label)
    path.unlink()
    path.write_bytes(small_object(b"VKDO", b"of tomorrow", version=2))
    before = tree(domain)
    with pytest.raises(PointNewerFormat, match=f"^{path}: format 2"):
        open_domain(point, label, "host-2")
    assert tree(domain) == before
    assert [found.backup for found in point.foreign_backups(label.cluster_uuid)]


def tree(domain: Domain) -> list[str]:
    return sorted(str(path) for path in Path(domain.paths.root).rglob("*"))


def test_a_damaged_label_is_in_nobodys_way(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    saved = save(domain, image_of(1))
    domain.close()
    path = Path(domain.paths.label)
    for content in (b"", path.read_bytes()[:4] + b"\2" + path.read_bytes()[5:]):
        path.chmod(0o600)
        path.write_bytes(content)
        again = open_domain(point, label)
        assert load(again, saved) == image_of(1)
        again.close()
