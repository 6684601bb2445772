"""`vmkeep vm track`: an alert is shown until somebody has looked into it, over restarts too."""

from __future__ import annotations

from pathlib import Path

from bench.service import Service
from engine.model import Baseline
from engine.snapshot.baselines import Baselines
from engine.state import State
from tests.integration.test_cli import Command

MISS = "backup b: a change in chunk 3 was not seen"


def alerts(vmkeep: Command) -> object:
    return vmkeep.json("vm", "inspect", "web")["alerts"]


def test_an_alert_stands_until_an_operator_ends_it(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Service(data) as service:
        vmkeep = Command(service.url, data)
        vmkeep.ok("vm", "create", "web", "--disk", "sda=default:web.img:1M")
        shown = vmkeep.json("vm", "inspect", "web")
        assert shown["alerts"] == []
        uuid, disks = str(shown["compute_uuid"]), shown["disks"]
        assert isinstance(disks, list)
    state = State(str(data / "state"))
    row = Baseline(vm_uuid=uuid, target_device="sda", volume=disks[0]["path"])
    Baselines(state, lambda: 1.0).turn_off(row, MISS)
    state.close()
    with Service(data) as service:
        vmkeep = Command(service.url, data)
        assert alerts(vmkeep) == [f"changes of sda are not tracked any more: {MISS}"]
        assert MISS in vmkeep.ok("vm", "inspect", "web")
        assert vmkeep.ok("vm", "track", "web").strip() == f"tracking VM {uuid}"
        assert alerts(vmkeep) == []
