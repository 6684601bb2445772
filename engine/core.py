"""The parts that the engine's verbs work with, put together once by engine/service.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.amends import Amends
from engine.catalogue.catalogue import Catalogue
from engine.config import Config
from engine.errors import NotFound
from engine.ids import normal
from engine.inventory.inventory import Inventory
from engine.inventory.scopes import covers
from engine.jobs.jobs import Jobs
from engine.model import Backup, Vm
from engine.points.points import Points
from engine.probes import Probes
from engine.restore.reservations import Reservations
from engine.snapshot.baselines import Baselines
from engine.snapshot.pinned import Pinned
from engine.snapshot.stuns import Stuns
from engine.state import State
from engine.turns import Turns
from engine.verb_types import Scope


@dataclass(frozen=True, slots=True)
class Core:
    """All thread-safe."""

    config: Config
    state: State
    inventory: Inventory
    catalogue: Catalogue
    jobs: Jobs
    points: Points
    baselines: Baselines
    probes: Probes = field(default_factory=Probes)
    reservations: Reservations = field(default_factory=Reservations)
    stuns: Stuns = field(default_factory=Stuns)
    pinned: Pinned = field(default_factory=Pinned)
    turns: Turns = field(default_factory=lambda: Turns(1))  # at a pool, at a volume
    amends: Amends = field(default_factory=Amends)
    clock: Callable[[], float] = time.time

    def vm_in(self, scope: Scope, uuid: str) -> Vm:
        """The VM, if it is in scope. NotFound."""
        vm = self.inventory.vm(normal(uuid))
        if not covers(self.inventory.places, scope, vm.cluster_uuid, vm.namespace):
            raise NotFound("vm", uuid)
        return vm

    def backup_in(self, scope: Scope, uuid: str) -> Backup:
        """The backup, if it is in scope. NotFound."""
        row = self.catalogue.get(normal(uuid), normal(scope.cluster_uuid))
        if not covers(self.inventory.places, scope, row.cluster_uuid, row.label.namespace):
            raise NotFound("backup", uuid)
        return row
