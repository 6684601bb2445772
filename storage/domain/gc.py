"""Garbage collection: room comes back without a backup ever waiting.

Plan, then execute. A pack without live chunks is dead for ever and needs only its RETIRE record; a
sparse one has its live frames copied into the gc session's packs first. The RETIRE is checked
against the state that it follows, so any number of backups, deletes and gcs may run beside it. Only
after it are files unlinked. Long manifest chains are folded by the same session.

A copy takes its chunk's place, and is trusted there. So a whole chunk is proved as it is copied. To
prove patches would be to read all of their bases: they must still lie, and be trusted, where they
were copied from when the RETIRE is appended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from storage.domain import orphans
from storage.domain.session import FoldedChain, Session
from storage.errors import Damaged, FileGone, PointFull, PointNewerFormat, Refused, translated
from storage.files.bad_places import open_to_read
from storage.format.chunks import FRAME_HEADER_BYTES, Decoder, Frame, make_frame
from storage.format.packs import ROW_BYTES, PackEntry, read_frame, require_content
from storage.format.record import DISKS_LIMIT
from storage.format.sealed import HEADER_BYTES, TAIL_BYTES
from storage.log.rebuild import own_part
from storage.view import tables
from storage.view.tables import LOST_LAYER, Tables, unpack_chunk_row
from storage.view.trust import Trust

if TYPE_CHECKING:
    from storage.domain.domain import Domain

CHAIN_LIMIT = 16
CHECKPOINT_EVERY_RECORDS = 512
PACKS_PER_RETIRE = 1 << 18  # 11 MiB: a record has a limit, what dies at once has none

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GcPlan:
    """What a gc would do: packs to retire, packs to copy the live part of first, and disks whose
    manifest chains are to be folded."""

    dead: tuple[str, ...] = ()
    sparse: tuple[str, ...] = ()
    long_chains: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a gc did. Bytes are of whole pack files."""

    packs_removed: int = 0
    bytes_removed: int = 0
    packs_repacked: int = 0
    bytes_copied: int = 0
    orphans_removed: int = 0
    chains_folded: int = 0
    damaged: tuple[str, ...] = ()
    short_of_room: bool = False  # sparse packs stay as they are, since copying needs room


def plan_gc(state: Tables, sparse_below: float, copy_budget_bytes: int) -> GcPlan:
    """Dead packs, then the sparsest within the budget. `sparse_below`: the share of a pack's frames
    that is live, 0 to 1."""
    dead, sparse = [], []
    if tables.lost_disks(state):
        return GcPlan()
    for pack, row in tables.packs.scan(state):
        if not row.live_chunks:
            if tables.may_retire(state, pack):
                dead.append(pack)
        elif row.live_bytes < sparse_below * _frames_bytes(row):
            sparse.append((row.live_bytes / _frames_bytes(row), row.live_bytes, pack))
    chosen, budget = [], copy_budget_bytes
    for _, live_bytes, pack in sorted(sparse):
        if live_bytes <= budget:
            chosen.append(pack)
            budget -= live_bytes
    chains = _long_chains(state) if copy_budget_bytes else ()
    return GcPlan(tuple(dead), tuple(chosen), chains)


def _frames_bytes(row: tables.PackState) -> int:
    """A pack without its header and table: else one of small frames would be sparse for ever.
    With the ids of patches' bases, which count as live bytes."""
    return row.size_bytes - HEADER_BYTES - row.count * ROW_BYTES - TAIL_BYTES


def _long_chains(state: Tables) -> tuple[str, ...]:
    """Disks whose own part of the manifest chain is longer than CHAIN_LIMIT."""
    found = []
    for disk, row in tables.disks.scan(state):
        end = tables.disks.require(state, row.parent).manifest if row.parent else ""
        length, name = 0, row.manifest
        while name and name != end:
            name = tables.manifests.require(state, name).base
            length += 1
        if length > CHAIN_LIMIT:
            found.append(disk)
    return tuple(found[:DISKS_LIMIT])


def reclaim(
    domain: Domain, sparse_below: float, copy_budget_bytes: int, cancelled: Callable[[], bool]
) -> GcReport:
    """Plans and executes. Any thread, any number at once. Raises StorageErrors; repeats safely.

    Without a budget dead packs of a large view may be left for later (storage.view.proof).
    """
    domain.refresh()
    # What takes no room goes first: it makes room for the rest.
    dead = domain.dead_packs(at_once=copy_budget_bytes > 0)
    report = GcReport()
    for at in range(0, len(dead), PACKS_PER_RETIRE):
        plan = GcPlan(dead[at : at + PACKS_PER_RETIRE])
        report = _both(report, execute_gc(domain, plan, cancelled))
    if not copy_budget_bytes:
        return report
    plan = _proved_plan(domain, sparse_below, copy_budget_bytes)
    report = replace(report, orphans_removed=orphans.sweep(domain))
    try:
        report = _both(report, execute_gc(domain, replace(plan, dead=()), cancelled))
        domain.checkpoint_if_due(CHECKPOINT_EVERY_RECORDS)
    except PointFull as error:
        log.warning("gc_short_of_room", extra={"domain": domain.paths.root, "error": str(error)})
        return replace(report, short_of_room=True)
    return report


def _proved_plan(domain: Domain, sparse_below: float, copy_budget_bytes: int) -> GcPlan:
    """From a view of which every row has just been read, if there is any pack to retire."""

    def planned(state: Tables) -> GcPlan:
        return plan_gc(state, sparse_below, copy_budget_bytes)

    plan = domain.view.ask(planned)
    if not (plan.dead or plan.sparse):
        return plan
    domain.prove_view()
    return domain.view.ask(planned)


def _both(freed: GcReport, copied: GcReport) -> GcReport:
    return replace(
        copied,
        packs_removed=freed.packs_removed + copied.packs_removed,
        bytes_removed=freed.bytes_removed + copied.bytes_removed,
        orphans_removed=freed.orphans_removed,
    )


def execute_gc(domain: Domain, plan: GcPlan, cancelled: Callable[[], bool]) -> GcReport:
    """Copies, appends RETIRE, unlinks. A pack with damage is left alone and named."""
    if not (plan.dead or plan.sparse or plan.long_chains):
        return GcReport()
    sizes = _sizes(domain, (*plan.dead, *plan.sparse))
    copied_bytes, emptied, damaged = 0, [], []
    unproved: dict[bytes, int] = {}
    with domain.begin("gc") as session:
        for pack in plan.sparse:
            if cancelled():
                break
            try:
                copied_bytes += _copy_live(domain, session, pack, unproved)
                emptied.append(pack)
            except (Damaged, FileGone, PointNewerFormat) as error:
                if _is_live(domain, pack):
                    damaged.append(str(error))
        folded = _fold_chains(domain, session, plan.long_chains)
        retired = session.retire(
            (*plan.dead, *emptied), folded, partial(_require_as_copied, domain.trust, unproved)
        ).packs
    return GcReport(
        packs_removed=len(retired),
        bytes_removed=sum(sizes[pack] for pack in retired),
        packs_repacked=len(set(emptied) & set(retired)),
        bytes_copied=copied_bytes,
        chains_folded=len(folded),
        damaged=tuple(damaged),
    )


def rewrite_manifests(domain: Domain, manifests: Collection[str]) -> int:
    """See Domain.rewrite_manifests."""
    with domain.view.read() as state:
        hit = [
            disk
            for disk, row in tables.disks.scan(state)
            if row.layer != LOST_LAYER
            and any(name in manifests for name, _ in own_part(state, disk)[2])
        ]
    if not hit:
        return 0
    with domain.begin("gc") as session:
        folded = _fold_chains(domain, session, hit[:DISKS_LIMIT])
        session.retire((), folded)
    return len(folded)


def _is_live(domain: Domain, pack: str) -> bool:
    """Whether the log, read to its end, still has it: else another gc was first."""
    domain.refresh()
    with domain.view.read() as state:
        return tables.packs.get(state, pack) is not None


def _sizes(domain: Domain, packs: Sequence[str]) -> dict[str, int]:
    with domain.view.read() as state:
        rows = {pack: tables.packs.get(state, pack) for pack in packs}
    return {pack: row.size_bytes if row else 0 for pack, row in rows.items()}


def _copy_live(domain: Domain, session: Session, pack: str, unproved: dict[bytes, int]) -> int:
    """Copies the frames that are placed in the pack, as they are; returns their bytes. Adds the
    patches among them, and the number of the pack, to `unproved`."""
    with domain.view.read() as state:
        row = tables.packs.get(state, pack)
        if row is None:
            raise FileGone(f"pack {pack} was retired")
        entries = domain.contents.footer(pack, row.digest)
        chunks = state.table("chunks").get_many([entry.chunk_id for entry in entries])
    placed = {chunk: unpack_chunk_row(value) for chunk, value in chunks.items()}
    wanted = [
        entry
        for entry in entries
        if entry.chunk_id in placed
        and placed[entry.chunk_id].pack == row.number
        and placed[entry.chunk_id].offset == entry.offset
    ]
    path = domain.paths.pack(pack)
    ids = [entry.chunk_id for entry in wanted]
    if not all(domain.trust.is_sound(chunk, row.number) for chunk in ids):
        raise Damaged(f"{path}: not all of it is whole, and the copy would be trusted")
    if len(domain.adopted.reliable(dict.fromkeys(ids, pack))) < len(ids):
        raise Damaged(f"{path}: another cluster made it, and not all of it is what it says")
    unproved.update((entry.chunk_id, row.number) for entry in wanted if entry.base)
    copied_bytes, decoder = 0, Decoder()
    with translated(path):
        fd = open_to_read(domain.fs, path)
        try:
            for entry in wanted:
                try:
                    frame = _checked_frame(domain, fd, path, entry, decoder)
                except Damaged:
                    domain.trust.withdraw(pack, frozenset({entry.chunk_id}))
                    raise
                session.store([frame])
                copied_bytes += FRAME_HEADER_BYTES + frame.stored_len
        finally:
            domain.fs.close(fd)
    return copied_bytes


def _checked_frame(domain: Domain, fd: int, path: str, entry: PackEntry, decoder: Decoder) -> Frame:
    view = read_frame(domain.fs, fd, entry, domain.chunk_size, path)
    if not entry.base:
        require_content(view, decoder, domain.hasher, f"{path} at {entry.offset}")
    return make_frame(view.chunk_id, view.raw_len, view.codec, view.payload)


def _require_as_copied(trust: Trust, unproved: Mapping[bytes, int], state: Tables) -> None:
    """Refused if one of the chunks (chunk → the pack that it was copied from) was found wrong, or
    was stored anew, meanwhile: the copy would take the place of what is right."""
    for chunk, value in state.table("chunks").get_many(list(unproved)).items():
        number = unpack_chunk_row(value).pack
        if number != unproved[chunk] or not trust.is_sound(chunk, number):
            raise Refused("patches were found damaged, or stored anew, while they were copied")


def _fold_chains(domain: Domain, session: Session, disks: Sequence[str]) -> list[FoldedChain]:
    """Writes each disk's layer as one manifest of the session; not of one that went meanwhile, or
    that a view made anew lacks: it would be written as a disk of zeros."""
    folded = [_fold_chain(domain, session, disk) for disk in disks]
    return [chain for chain in folded if chain is not None]


def _fold_chain(domain: Domain, session: Session, disk: str) -> FoldedChain | None:
    with domain.view.read() as state:
        row = tables.disks.get(state, disk)
        if row is None or row.layer == LOST_LAYER:
            return None
        builder = session.manifest(disk, row.capacity, row.parent or None)
        for page_no, page in tables.layer_pages(state, row.layer):
            builder.writer.add_page(page_no, page)
    return FoldedChain(disk, row.manifest, row.parent)
