"""Rules of the protocol, broken one at a time. The model must notice each (see test_model.py).

Some are rules of the real code, which is patched; the others are rules that its callers keep to,
which are Rules of the model's processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import msgspec

from storage.domain import gc
from storage.domain.session import FoldedChain
from storage.format.packs import PackEntry
from storage.format.record import FileSeal, Rebase
from storage.log.fold import _Step
from storage.view import index, tables
from storage.view.index import Index
from storage.view.tables import ManifestState, SessionState
from tests.model import collector
from tests.model.world import Rules

Patch = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Mutation:
    """`cast`: who finds it. `says`: what the violation, or the error, begins with."""

    name: str
    says: str
    cast: tuple[str, ...]
    rules: Mapping[str, bool] = field(default_factory=dict)
    patches: tuple[Patch, ...] = ()
    lossy: tuple[str, ...] = ()

    def broken_rules(self) -> Rules:
        return Rules(**self.rules)

    def applied(self) -> ExitStack:
        stack = ExitStack()
        for made in self.patches:
            stack.enter_context(made())
        return stack


def _in_place_of(owner: object, name: str, new: object) -> Patch:
    return lambda: patch.object(owner, name, new)


_rebase, _place_pack = _Step._rebase, Index._place_pack
_move, _footer = Index.move, Index._footer
_merge, _fold_chains = index._merge, gc._fold_chains


def _require_nothing(self: Index) -> None:
    self._missing.clear()


def _retire_any_pack(self: _Step, pack: str, own: dict[str, int]) -> None:
    del own
    state = tables.packs.require(self.state, pack)
    tables.drop_pack(self.state, pack, state)
    self.garbage.packs.append(pack)


def _session_or_ghost(self: _Step, session: str) -> SessionState:
    row = tables.sessions.get(self.state, session)
    return row or SessionState("backup", "host-0", "1", (), 0)


def _rebase_whatever(
    self: _Step, session: str, rebase: Rebase, manifests: dict[int, FileSeal]
) -> None:
    now = tables.disks.get(self.state, rebase.disk)
    if now is not None:
        rebase = msgspec.structs.replace(rebase, was=now.manifest, parent=now.parent)
    _rebase(self, session, rebase, manifests)


def _add_uncounted(self: _Step, name: str, seal: FileSeal, base: str, users: int) -> None:
    row = ManifestState(seal.size_bytes, seal.count, seal.digest, base, users)
    tables.manifests.put(self.state, name, row)


def _place_oldest(self: Index, pack: str, number: int, *, only_known: bool) -> None:
    """What the index knows stays where it is, but for a gc's moves."""
    if only_known:
        _place_pack(self, pack, number, only_known=only_known)
        return
    self._chunks.flush()
    known = dict(self._state.table("chunks").scan())
    _place_pack(self, pack, number, only_known=only_known)
    for key, row in known.items():
        self._chunks.put(key, row)
    self._live_bytes.clear()
    self._live_chunks.clear()


def _move_anything(self: Index, numbers: Mapping[str, int]) -> None:
    self.place(numbers)


def _balance_nothing(self: Index) -> None:
    self._on_bases.clear()


def _move_as_whole(self: Index, numbers: Mapping[str, int]) -> None:
    with patch.object(Index, "_footer", _footer_without_bases):
        _move(self, numbers)


def _footer_without_bases(self: Index, pack: str) -> Sequence[PackEntry]:
    return [entry._replace(base=b"") for entry in _footer(self, pack)]


def _merge_upside_down(
    under: Mapping[int, bytes], over: Mapping[int, bytes], *, root: bool
) -> dict[int, bytes]:
    return _merge(over, under, root=root)


def _fold_chains_of_all(domain: Any, session: Any, disks: Sequence[str]) -> list[FoldedChain]:
    with domain.view.read() as state:
        for disk in disks:
            tables.disks.require(state, disk)
    return _fold_chains(domain, session, disks)


DEDUP = ("b1", "forget-q", "gc")
CHAIN = ("b1", "forget-p", "gc")
ORPHANS = ("b2", "sweeper", "reaper")
RESTORE = ("restore", "forget-q", "gc")
IMPORT = ("import", "forget-q", "gc")
PATCHES = ("b4", "b5", "forget-4", "gc")
BASES = ("b4", "b6", "b7")
GENERATIONS = ("b1", "b3", "forget-1", "forget-p", "gc")


def _fold(name: str, says: str, cast: tuple[str, ...], *patches: Patch) -> Mutation:
    return Mutation(name, says, cast, patches=patches)


def _rule(rule: str, says: str, cast: tuple[str, ...], lossy: tuple[str, ...] = ()) -> Mutation:
    # Where a loss is asked for, a failure that comes before it is let pass.
    needs_cause = says.startswith("I7: failed")
    rules = {rule: False, "failures_need_a_cause": needs_cause}
    return Mutation(f"not {rule}", says, cast, rules=rules, lossy=lossy)


COPIES_NOTHING = _in_place_of(collector, "_placed", lambda *_: [])
RETIRES_ANY = _in_place_of(_Step, "_retire_pack", _retire_any_pack)
BELIEVES_CHAINS = _in_place_of(FoldedChain, "still_true", lambda *_: True)
REBASES_ANY = _in_place_of(_Step, "_rebase", _rebase_whatever)

MUTATIONS = (
    _fold(
        "COMMIT does not look its chunks up",
        "I1: ",
        DEDUP,
        _in_place_of(Index, "_require_all", _require_nothing),
    ),
    _fold(
        "RETIRE believes a gc that has copied nothing", "I1: ", DEDUP, COPIES_NOTHING, RETIRES_ANY
    ),
    _fold(
        "an ABORT does not stop a COMMIT",
        "I4: ",
        ORPHANS,
        _in_place_of(_Step, "_open_session", _session_or_ghost),
    ),
    _fold(
        "a FORGET releases what is held",
        "I7: ",
        RESTORE,
        _in_place_of(tables, "held_backups", lambda *_: frozenset()),
    ),
    _fold(
        "a released parent is not waited for",
        "I7: ",
        CHAIN,
        _in_place_of(tables, "held_backups", lambda *_: frozenset()),
    ),
    _fold(
        "the older place of a chunk wins",
        "I8: ",
        ("b1", "b2"),
        _in_place_of(Index, "_place_pack", _place_oldest),
    ),
    _fold(
        "a manifest may go while another builds on it",
        "I8: ",
        CHAIN,
        _in_place_of(_Step, "_add_manifest", _add_uncounted),
    ),
    _fold(
        "a chain is replaced though it has changed",
        "I",
        GENERATIONS,
        BELIEVES_CHAINS,
        REBASES_ANY,
    ),
    _fold(
        "chunks that nothing references stay in the index",
        "I1: ",
        IMPORT,
        _in_place_of(Index, "settle", lambda *_: None),
    ),
    _fold(
        "a gc brings a deleted chunk back",
        "I1: ",
        DEDUP,
        _in_place_of(Index, "move", _move_anything),
    ),
    _fold(
        "a released layer wins over its child's",
        "I1: ",
        CHAIN,
        _in_place_of(index, "_merge", _merge_upside_down),
    ),
    _fold(
        "a base goes with its last entry, though patches stand on it",
        "I",
        ("b4", "forget-p"),
        _in_place_of(Index, "balance", _balance_nothing),
    ),
    _fold(
        "a moved patch refers to no base any more",
        "I",
        PATCHES,
        _in_place_of(Index, "move", _move_as_whole),
    ),
    _fold(
        "a base may become a patch",
        "I1: a base is a patch",
        BASES,
        _in_place_of(Index, "_baseless", lambda *_: set()),
    ),
    # A defect that the model found: a gc failed as if the view were damaged.
    _fold(
        "a gc folds the chain of a disk that has gone",
        "ViewDamaged: view: disks lacks",
        GENERATIONS,
        _in_place_of(gc, "_fold_chains", _fold_chains_of_all),
    ),
    _rule("settles_by_nonce", "I7: a backup is there", ("b1", "b2"), lossy=("b1",)),
    _rule("link_never_overwrites", "I6: ", ("b1", "b2")),
    _rule("lost_race_is_lost", "I7: an acknowledged backup", ("b1", "b2")),
    _rule("holds_parent", "I7: failed", CHAIN),
    _rule("reader_holds", "I7: failed", RESTORE),
    _rule("reader_relocates", "I7: failed", RESTORE),
    _rule("retires_before_unlink", "I2: ", DEDUP),
    _rule("aborts_before_delete", "I2: ", ORPHANS),
    _rule("spares_open_sessions", "I2: ", ORPHANS),
    _rule("lists_before_refresh", "I2: ", ORPHANS),
    _rule("refreshes_before_judging", "I2: ", ("b2", "sweeper-0")),
    _rule("manifest_before_commit", "I2: ", ("b1",)),
    _rule("fresh_session_names", "I5: ", IMPORT),
    _rule("import_links", "I2: ", IMPORT),
)

# Rules that a second one stands behind: with either one alone nothing is lost.
DEFENCES = (
    _fold("a gc copies nothing", "", DEDUP, COPIES_NOTHING),
    _fold("RETIRE does not count live chunks", "", DEDUP, RETIRES_ANY),
    _fold("a gc does not look whether a chain has changed", "", GENERATIONS, BELIEVES_CHAINS),
    _fold("the fold does not look whether a chain has changed", "", GENERATIONS, REBASES_ANY),
    _rule("holds_parent", "", CHAIN),
)
