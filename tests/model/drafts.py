"""The op builders of storage.domain.session.Session, the real ones, without a session's threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from storage.domain.session import FoldedChain, NewBackup, Session, _SealedManifest
from storage.format.record import FileSeal, Op
from storage.log.fold import Garbage
from storage.view.tables import Tables


class Draft(Session):
    """A session whose files are sealed already. `manifests`: disk -> (seal, parent's disk)."""

    def __init__(
        self,
        session: str,
        packs: Sequence[FileSeal],
        manifests: Mapping[str, tuple[FileSeal, str]],
    ) -> None:
        self.id = session
        self._packs = tuple(packs)
        self._manifests = {
            disk: _SealedManifest(seal, 1 << 30, parent)
            for disk, (seal, parent) in manifests.items()
        }
        self._build: Callable[[Tables], Sequence[Op]] = lambda _: ()

    def _seal_all(self) -> tuple[FileSeal, ...]:
        return self._packs

    def _append(self, build: Callable[[Tables], Sequence[Op]]) -> Garbage:
        self._build = build
        return Garbage()

    def commit_ops(self, state: Tables, backups: Sequence[NewBackup]) -> Sequence[Op]:
        self.commit(backups)
        return self._build(state)

    def retire_ops(
        self, state: Tables, packs: Sequence[str], folded: Sequence[FoldedChain]
    ) -> Sequence[Op]:
        self.retire(packs, folded)
        return self._build(state)

    def end_ops(self, state: Tables) -> Sequence[Op]:
        self.end()
        return self._build(state)
