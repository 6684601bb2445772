"""A running domain's disks at one instant: QEMU's backup job in pull mode, read over NBD.

One call to libvirt begins the job on all disks, and a checkpoint with it, in one transaction; the
guest's file systems are frozen for that call only. From then on QEMU puts aside what the guest
overwrites (scratch.py) and serves the disks as they were. Disks that have a bitmap since the
parent's checkpoint tell what changed; all others are read in full, in the same job.

What libvirt refuses is asked for again with less: without the parent's bitmaps, then without
bitmaps at all. So lost tracking costs a read, never a backup, and the reason is in the notes.

The end of the block ends the job and puts the checkpoints in order (checkpoints.py). libvirtd may
be restarted meanwhile: QEMU serves on, and the end is patient (ending.py).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from engine.errors import (
    Conflict,
    DiskServerLost,
    DiskServerRefused,
    EngineError,
    HypervisorAway,
    HypervisorRefused,
    ScratchFull,
)
from engine.libvirt import checkpoints
from engine.libvirt.agent import agent_hook
from engine.libvirt.binding import (
    BACKUP_REUSE_EXTERNAL,
    INCREMENTAL_LOST,
    NO_SUCH_DOMAIN,
    Domain,
    LibvirtFault,
    code_of,
)
from engine.libvirt.capacity import size_by_libvirt, size_by_medium
from engine.libvirt.domains import DomainDisk, DomainFacts, read_domain
from engine.libvirt.ending import FindDomain, abort_job, end_job, end_later, end_left_job
from engine.libvirt.half_begun import is_half_begun, is_stuck
from engine.libvirt.jobxml import JobDisk, backup_xml, checkpoint_xml, export_bitmap, record_xml
from engine.libvirt.machine import inflated, machine_of
from engine.libvirt.media import has_bitmaps, identity_of
from engine.libvirt.scratch import ScratchWatch, make_anew, remove_left
from engine.libvirt.setup import LiveSetup
from engine.model import Vm
from engine.nbd.connection import NbdAddress
from engine.nbd.source import NbdSource, connections_to_qemu
from engine.qemu.empty import empty_qcow2
from engine.snapshot.freeze import Freeze, frozen
from engine.snapshot.hold import HoldWish
from engine.snapshot.snapshot import SnapshotFacts
from engine.snapshot.sources import DiskSource, VolumeSource
from storage.files.in_flight import InFlight

log = logging.getLogger(__name__)

READ_TIMEOUT_S = 120.0
_HALF_BEGUN = (
    "libvirtd died when it began a backup of VM {name}, and lets nobody begin another one: "
    "see docs/operations.md"
)


def begin_live(
    find: FindDomain, vm: Vm, setup: LiveSetup, wish: HoldWish, parent: str
) -> LiveBackup:
    """The disks, held. `parent`: the backup that may be built on, or "".

    Conflict (domain_busy, domain_stopped), ScratchFull, HypervisorAway, HypervisorRefused,
    DiskServer… errors; then nothing is left behind.
    """
    if not setup.scratch:
        raise HypervisorRefused("a live backup needs a directory: scratch in [libvirt]")
    domain = find()
    with contextlib.suppress(LibvirtFault):  # what follows says so
        end_left_job(find, setup.ours)
    facts = _facts_of(domain, vm)
    media = _media(facts)
    job = _Job(find, vm, setup, wish, _empty_images(domain, vm, facts))
    job.watch.require_room()
    with contextlib.ExitStack() as undo:
        undo.callback(job.end, committed=False)
        job.make_scratch()
        begun = _begun(domain, facts, media, job, parent)
        sources = {}
        paths = {disk.target: disk.source for disk in facts.disks}
        for disk in begun.disks:
            sources[disk.target] = source = job.open(disk, paths[disk.target])
            undo.callback(source.close)
        held = LiveBackup(job, sources, _told(domain, facts, job, begun, sources))
        undo.pop_all()
    return held


class LiveBackup:
    """A Held. See engine/snapshot/hold.py and the module."""

    def __init__(self, job: _Job, sources: dict[str, NbdSource], facts: SnapshotFacts) -> None:
        self.facts = facts
        self._job = job
        self._sources = sources
        self._committed = False

    @property
    def sources(self) -> dict[str, DiskSource]:
        return dict(self._sources)

    @property
    def clones(self) -> dict[str, VolumeSource]:
        return {}

    def verify_unchanged(self) -> None:
        """Raises ScratchFull. All else that goes wrong makes reading fail."""
        if self._job.watch.problem:
            raise ScratchFull(self._job.watch.problem)

    def committed(self) -> None:
        """Its checkpoint is worth keeping, and the parent's is not."""
        self._committed = True

    def __enter__(self) -> LiveBackup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for source in self._sources.values():
            source.close()
        stopped = self._job.end(committed=self._committed)
        if not isinstance(error, DiskServerLost | DiskServerRefused):
            return
        if self._job.watch.problem:
            raise ScratchFull(self._job.watch.problem) from error
        if stopped:
            raise _stopped(self._job.vm) from error


class _Job:
    """The job and what belongs to it: names, files, its end."""

    def __init__(
        self,
        find: FindDomain,
        vm: Vm,
        setup: LiveSetup,
        wish: HoldWish,
        empty: Sequence[bytes],
    ) -> None:
        """`empty`: for each disk a qcow2 image of its size."""
        self.find = find
        self.vm = vm
        self.setup = setup
        self.wish = wish
        self.checkpoint = checkpoints.name_for(setup.host, wish.backup_uuid)
        self.socket = f"{setup.ours}{wish.backup_uuid[:8]}.sock"
        self._files = [self.scratch_for(number) for number in range(len(vm.disks))]
        self._empty = empty
        self.watch = ScratchWatch(
            setup.scratch, self._files, setup.reserve_bytes, setup.limit_bytes, self._abort
        )

    def scratch_for(self, number: int) -> str:
        return f"{self.setup.ours}{self.wish.backup_uuid}.{number}"

    def make_scratch(self) -> None:
        """New scratch files. ScratchFull, HypervisorRefused."""
        for path, content in zip(self._files, self._empty, strict=True):
            make_anew(path, content)

    def open(self, disk: JobDisk, path: str) -> NbdSource:
        bitmap = export_bitmap(disk.target) if disk.base else ""
        address = NbdAddress(path=self.socket)
        return NbdSource.open(
            address,
            disk.target,
            bitmap,
            timeout_s=READ_TIMEOUT_S,
            connections=connections_to_qemu(len(self._files)),
            place=path,
        )

    def end(self, *, committed: bool) -> bool:
        """Ends the job, and puts the checkpoints in order. Whether the domain is not running."""
        with InFlight(self.vm.host):
            return self._end(committed)

    def _end(self, committed: bool) -> bool:
        self.watch.stop()
        end = end_job(self.find, self.setup.ours, self.socket)
        if end == "unknown":
            files = [*self._files, self.socket]
            end_later(self.find, self.setup.ours, self.socket, files)
        try:
            domain = self.find()
            if committed:
                kept = self.wish.kept | {self.wish.backup_uuid}
                checkpoints.sweep(domain, self.setup.host, kept)
            else:
                checkpoints.drop(domain, self.checkpoint)
        except (LibvirtFault, EngineError) as error:
            # The next success sweeps what is left.
            fields = {"vm": self.vm.uuid, "why": str(error)}
            log.warning("checkpoints_left", extra=fields)
        remove_left([*self._files, self.socket])
        return end == "stopped"

    def _abort(self) -> bool:
        return abort_job(self.find, self.setup.ours, self.socket)


@dataclass(frozen=True, slots=True)
class _Begun:
    """How the job could be begun."""

    disks: Sequence[JobDisk]
    freeze: Freeze
    notes: tuple[str, ...]


def _begun(domain: Domain, facts: DomainFacts, media: list[int], job: _Job, parent: str) -> _Begun:
    """The job is on, and watched. `media`: how large they were before QEMU was asked for the sizes
    of the disks. Raises as begin_live."""
    since, notes = frozenset[str](), list[str]()
    if parent:
        name = checkpoints.name_for(job.setup.host, parent)
        known = inflated(job.wish.checkpoint) or _record_of(name, facts, job)
        _require_no_job(domain, job.vm)  # it may have QEMU create an image (capacity.py)
        since, why = checkpoints.disks_since(domain, name, known)
        notes = _read_in_full(facts, job, since, why)
    rungs = _rungs(facts, job, parent, since)
    hook, agent_note = agent_hook(job.find, facts, job.vm, job.setup)
    with frozen(hook) as freeze:
        if _media(facts) != media:  # no scratch file has the size of that disk
            raise Conflict("volume_changed", f"the disks of VM {job.vm.name} are being resized")
        disks = _begin_with_less(domain, job, rungs, notes)
        job.watch.start()
    notes += [*freeze.notes, *([agent_note] if agent_note else [])]
    return _Begun(disks, freeze, tuple(notes))


def _rungs(
    facts: DomainFacts, job: _Job, parent: str, since: frozenset[str]
) -> list[list[JobDisk]]:
    """What to ask for, and with how much less if that is refused."""
    base = checkpoints.name_for(job.setup.host, parent)
    wanted = []
    for number, disk in enumerate(facts.disks):
        tracked = has_bitmaps(disk)
        usable = tracked and _is_same(disk, job) and disk.target in since
        scratch = job.scratch_for(number)
        wanted.append(JobDisk(disk.target, scratch, tracked, base if usable else ""))
    full = [JobDisk(disk.target, disk.scratch, disk.tracked) for disk in wanted]
    plain = [JobDisk(disk.target, disk.scratch, tracked=False) for disk in wanted]
    rungs = [wanted, full, plain]
    return [rung for number, rung in enumerate(rungs) if rung not in rungs[:number]]


def _is_same(disk: DomainDisk, job: _Job) -> bool:
    """Whether its medium is the one that the parent's checkpoint was made on."""
    return job.wish.identities.get(disk.target) == identity_of(disk)


def _record_of(name: str, facts: DomainFacts, job: _Job) -> str:
    """The checkpoint that a backup of the stopped domain began, by its bitmaps; "" for none."""
    recorded = [disk.target for disk in facts.disks if has_bitmaps(disk) and _is_same(disk, job)]
    return record_xml(name, recorded, [disk.target for disk in facts.disks])


def _read_in_full(facts: DomainFacts, job: _Job, since: frozenset[str], why: str) -> list[str]:
    """Why disks that could have a bitmap, and whose parent has them, can't use one.

    `why`: the reason if it is the same for all, or "".
    """
    known = [d for d in facts.disks if job.wish.identities.get(d.target) and has_bitmaps(d)]
    same = [disk for disk in known if _is_same(disk, job)]
    others = [disk for disk in known if disk not in same]
    notes = [f"{disk.target} full read: its medium is another one" for disk in others]
    if why:
        return [*notes, *([f"full read: {why}"] if same or not known else [])]
    lost = [disk for disk in same if disk.target not in since]
    missing = "the parent's checkpoint does not have it"
    return [*notes, *(f"{disk.target} full read: {missing}" for disk in lost)]


def _begin_with_less(
    domain: Domain, job: _Job, rungs: list[list[JobDisk]], notes: list[str]
) -> list[JobDisk]:
    _require_no_job(domain, job.vm)  # somebody may have begun one while the guest was being frozen
    for number, disks in enumerate(rungs):
        if number:
            job.make_scratch()  # a job may have begun, and put something aside, before it failed
        checkpoint = checkpoint_xml(job.checkpoint, disks) or None
        try:
            domain.backupBegin(backup_xml(disks, job.socket), checkpoint, BACKUP_REUSE_EXTERNAL)
        except LibvirtFault as error:
            _require_running(domain, job.vm)
            _require_no_job(domain, job.vm)
            lost = code_of(error) in INCREMENTAL_LOST
            notes.append(f"full read: {'changed blocks are lost: ' if lost else ''}{error}")
            log.warning("live_backup_refused", extra={"vm": job.vm.uuid, "why": str(error)})
        else:
            return disks
    raise HypervisorRefused(notes[-1].removeprefix("full read: "))


def _told(
    domain: Domain,
    facts: DomainFacts,
    job: _Job,
    begun: _Begun,
    sources: dict[str, NbdSource],
) -> SnapshotFacts:
    xml = checkpoints.xml_of(domain, job.checkpoint)
    machine, notes = machine_of(domain, facts, job.setup.tpm_directory, xml)
    return SnapshotFacts(
        methods=dict.fromkeys(sources, "live"),
        capacities={target: source.capacity for target, source in sources.items()},
        frozen=begun.freeze.held,
        notes=(*begun.notes, *notes),
        freeze_s=begun.freeze.held_s,
        identities={disk.target: identity_of(disk) for disk in facts.disks},
        machine=machine,
    )


def _facts_of(domain: Domain, vm: Vm) -> DomainFacts:
    """The live XML's. Conflict if the domain does not run, or has other disks than it had."""
    _require_running(domain, vm)
    try:
        if is_stuck(domain):
            raise HypervisorRefused(_HALF_BEGUN.format(name=vm.name))
        facts = read_domain(domain.XMLDesc())
    except LibvirtFault as error:
        raise HypervisorRefused(f"{vm.name}: {error}") from error
    _require_no_job(domain, vm)
    if [disk.target for disk in facts.disks] != [disk.target_device for disk in vm.disks]:
        raise Conflict("volume_changed", f"the disks of VM {vm.name} are being changed")
    return facts


def _media(facts: DomainFacts) -> list[int]:
    return [size_by_medium(disk) for disk in facts.disks]


def _empty_images(domain: Domain, vm: Vm, facts: DomainFacts) -> list[bytes]:
    """A new qcow2 image of each disk's size. Conflict, HypervisorRefused, DiskServer… errors.

    Of the size that QEMU has it at: a medium may have been extended without a word to QEMU, and
    libvirtd (9.0) dies when QEMU refuses a scratch file of another size.
    """
    made: dict[int, bytes] = {}
    sizes = [size_by_libvirt(domain, disk, active=True) for disk in facts.disks]
    for disk, size_bytes in zip(facts.disks, sizes, strict=True):
        if not size_bytes:
            _require_no_job(domain, vm)
            raise HypervisorRefused(
                f"{facts.name}: libvirt does not tell the size of {disk.target}"
            )
        if size_bytes not in made:
            made[size_bytes] = empty_qcow2(disk.source, size_bytes)
    return [made[size_bytes] for size_bytes in sizes]


def _require_running(domain: Domain, vm: Vm) -> None:
    """Conflict(domain_stopped), HypervisorAway."""
    try:
        if domain.isActive():
            return
    except LibvirtFault as error:
        if code_of(error) != NO_SUCH_DOMAIN:
            raise HypervisorAway(f"{vm.host}: {error}") from error
    raise _stopped(vm)


def _stopped(vm: Vm) -> Conflict:
    return Conflict("domain_stopped", f"VM {vm.name} stopped during its backup")


def _require_no_job(domain: Domain, vm: Vm) -> None:
    """libvirt would wait 30 s for the other job before it says so."""
    try:
        busy = domain.jobInfo()[0] != 0
    except LibvirtFault as error:
        busy = is_half_begun(error)  # else it stopped: what follows says so
    if busy:
        raise Conflict("domain_busy", f"libvirt runs another job on VM {vm.name}")
