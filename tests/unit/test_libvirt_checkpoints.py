"""Checkpoints are put in order only while nobody's job is on: libvirt asks QEMU for its nodes."""

from __future__ import annotations

from typing import Any

import pytest

from engine.libvirt import checkpoints, half_begun
from engine.libvirt.binding import LibvirtFault


class Kept:
    def __init__(self) -> None:
        self.deleted = 0

    def delete(self, _flags: int = 0) -> int:
        self.deleted += 1
        return 0


class Working:
    """A domain with one checkpoint. `job`: libvirt's number of what it does, or its complaint."""

    def __init__(self, job: int | str) -> None:
        self._job = job
        self.kept = Kept()

    def jobInfo(self) -> list[int]:
        if isinstance(self._job, str):
            raise LibvirtFault(self._job)
        return [self._job]

    def checkpointLookupByName(self, _name: str) -> Kept:
        return self.kept


@pytest.mark.parametrize(
    ("job", "deleted"),
    [(0, 1), (2, 0), ("internal error: backup job data missing", 0), ("domain is not running", 1)],
)
def test_a_checkpoint_stays_while_anybodys_job_is_on(
    monkeypatch: pytest.MonkeyPatch, job: int | str, deleted: int
) -> None:
    monkeypatch.setattr(half_begun, "code_of", lambda _: 1)
    domain: Any = Working(job)
    checkpoints.drop(domain, "one")
    assert domain.kept.deleted == deleted
