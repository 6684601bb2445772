"""How a VM's disks are held still for a backup: what every way of doing it has in common.

engine/snapshot/snapshot.py clones volumes or reads them directly; engine/libvirt/live.py has QEMU
keep what the guest overwrites. An inventory that knows a better way for a VM than snapshot.py says
so by `hold_for`. What a way learns that the next backup of the VM needs goes into the label, and
comes back in the next one's `HoldWish`. Of a VM that is left to snapshot.py an inventory may know
more than its volumes: `Resting`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, TypeAlias

from engine.model import Machine
from engine.snapshot.snapshot import SnapshotFacts
from engine.snapshot.sources import BitmapPlan, DiskSource, VolumeSource


class Held(Protocol):
    """A VM's disks at one instant; its end lets go of them."""

    facts: SnapshotFacts

    @property
    def sources(self) -> dict[str, DiskSource]:
        """By target device."""
        ...

    @property
    def clones(self) -> dict[str, VolumeSource]:
        """By target device: those sources that are clones of our own."""
        ...

    def verify_unchanged(self) -> None:
        """Raises unless all that was read is of that instant."""
        ...

    def committed(self) -> None:
        """The backup of these disks is on its point, for others to build on."""
        ...

    def __enter__(self) -> Held: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


# Given the parent that the backup may build on, or "".
Hold: TypeAlias = Callable[[str], Held]


@dataclass(frozen=True, slots=True)
class HoldWish:
    """For which backup, on which one it would build ("" for none).

    `identities` and `checkpoint` are what the parent's label says. `kept`: other backups of the VM
    that may still be somebody's parent.
    """

    backup_uuid: str
    parent: str = ""
    identities: Mapping[str, str] = field(default_factory=dict)  # by target device
    checkpoint: bytes = b""
    kept: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Resting:
    """A VM whose disks are cloned, or read as they lie. Mappings are by target device.

    `machine`: what a restore needs to make such a VM again; `notes`: what of it is not kept.
    `bitmaps`: for qcow2 images, where the inventory has a say in their names. `identities`: which
    files the disks are, for the label of a backup from which on their images record changes.
    """

    machine: Machine | None = None
    notes: tuple[str, ...] = ()
    bitmaps: Mapping[str, BitmapPlan] = field(default_factory=dict)
    identities: Mapping[str, str] = field(default_factory=dict)
