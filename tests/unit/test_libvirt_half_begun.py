"""A backup job that libvirt takes for one that is beginning: is it, or did libvirtd die in it?"""

from __future__ import annotations

from typing import Any

import pytest

from engine.libvirt import ending, half_begun
from engine.libvirt.binding import LibvirtFault

OURS = "/scratch/host-"
OUR_NODE = {"node-name": "left", "drv": "qcow2", "file": f"{OURS}1.0"}
CREATING = [{"id": "create-1", "type": "create", "status": "running"}]
CREATED = [{"id": "create-1", "type": "create", "status": "concluded"}]


class Beginning:
    """A domain with a backup that begins; after `asked` questions it has begun, if ever."""

    def __init__(self, asked: int | None, jobs: list[dict[str, str]]) -> None:
        self._left = asked
        self._jobs = jobs
        self._nodes = [OUR_NODE]
        self.told: list[str] = []

    def jobInfo(self) -> list[int]:
        if self._left is not None:
            if self._left == 0:
                return [2]
            self._left -= 1
        raise LibvirtFault("internal error: backup job data missing")

    def backupGetXMLDesc(self) -> str:
        return "<domainbackup><server transport='unix' socket='/others'/></domainbackup>"

    def qemu(self, command: str, **_: Any) -> object:
        self.told.append(command)
        if command == "query-jobs":
            return self._jobs
        if command == "job-dismiss":
            self._jobs = []
        if command == "blockdev-del":
            self._nodes = []
        return self._nodes


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(domain: Beginning, command: str, **arguments: object) -> object:
        return domain.qemu(command, **arguments)

    monkeypatch.setattr(half_begun, "ask_qemu", ask)
    monkeypatch.setattr(half_begun, "code_of", lambda _: 1)
    monkeypatch.setattr(half_begun, "_BEGINS_S", 0.2)


@pytest.mark.parametrize(
    ("asked_until_it_has", "jobs", "told"),
    [(2, CREATING, []), (None, CREATING, ["query-jobs"])],
    ids=["begins", "begins slowly"],
)
def test_qemu_is_not_asked_for_its_nodes_while_somebodys_backup_begins(
    asked_until_it_has: int | None, jobs: list[dict[str, str]], told: list[str]
) -> None:
    """It may be creating an image, and abort."""
    domain: Any = Beginning(asked_until_it_has, jobs)
    ending.end_left_job(lambda: domain, OURS)
    assert domain.told == told


def test_what_goes_on_beginning_is_ended() -> None:
    domain: Any = Beginning(None, CREATED)
    ending.end_left_job(lambda: domain, OURS)
    first_nodes = domain.told.index("query-named-block-nodes")
    assert set(domain.told[:first_nodes]) == {"query-jobs"}
    assert {"job-dismiss", "nbd-server-stop", "blockdev-del"} <= set(domain.told)
