"""Unlinking files that no record names, in the only order that is safe.

A directory is listed first; then the log is read to its end, as the server has it; only then is
judged what is an orphan. So whatever owns a listed file had its OPEN in the log before the
judgement. The look at the log also tells whether it is still the one that the state comes from: of
an older copy of it, or of another point that has come to be mounted there, any file may be nobody's
by that state.
"""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING

from storage.errors import PointFull, PointReadOnly, StorageError, translated
from storage.files.fs import Fs
from storage.log.fold import Garbage
from storage.view import tables
from storage.view.tables import Tables

if TYPE_CHECKING:
    from storage.domain.domain import Domain

# By whose rows it is judged whether a file is anybody's: one that is missing must not count.
_JUDGES = ("sessions", "packs", "manifests")
_SESSION = re.compile("[0-9a-f]{32}")

log = logging.getLogger(__name__)


def unlink_garbage(domain: Domain, garbage: Garbage) -> int:
    """Unlinks what a durable record made unreferencable; returns how many files went.

    A failure is left for the next sweep: the record stands.
    """
    files = [domain.paths.pack(pack) for pack in garbage.packs]
    files += [domain.paths.manifest(manifest) for manifest in _unneeded(domain, garbage.manifests)]
    gone = sum(_unlink(domain.fs, path) for path in files)
    for session in garbage.sessions:
        for root in (domain.paths.packs, domain.paths.manifests, domain.paths.tmp):
            gone += remove_directory(domain.fs, os.path.join(root, session))
    for parent in sorted({os.path.dirname(path) for path in files}):
        _remove_if_empty(domain.fs, parent)
    return gone


def _unneeded(domain: Domain, manifests: list[str]) -> list[str]:
    """The manifests, when the state agrees by another account than their users' counts; else none:
    the view is damaged, and a later sweep, by one made anew, sees what is nobody's."""
    if not manifests:
        return []

    def needed(state: Tables) -> set[str]:
        bases = {row.base for _, row in tables.manifests.scan(state)}
        return bases | {row.manifest for _, row in tables.disks.scan(state)}

    try:
        contradicted = domain.view.ask(needed).intersection(manifests)
    except StorageError as error:
        log.warning("manifests_left", extra={"domain": domain.paths.root, "error": str(error)})
        return []
    if contradicted:
        domain.view.suspect = f"view: manifest {min(contradicted)} went, but is needed"
        return []
    return manifests


def sweep(domain: Domain, *, thorough: bool = True) -> int:
    """Deletes every file of packs/, manifests/ and tmp/ that is nobody's; returns how many.

    Not `thorough`: the directories of sessions that own a live file are not looked into, which
    saves a request for each backup there is.
    """
    fs, paths = domain.fs, domain.paths
    with translated(paths.root):
        roots = {root: _named(fs, root) for root in (paths.packs, paths.manifests, paths.tmp)}
        if not thorough:
            for root, table in ((paths.packs, "packs"), (paths.manifests, "manifests")):
                roots[root] = _without_files(domain, table, roots[root])
        listed = {
            root: {session: readable_names(fs, os.path.join(root, session)) for session in sessions}
            for root, sessions in roots.items()
        }
    try:
        domain.refresh_to_end()
    except (PointFull, PointReadOnly) as error:
        log.warning("orphans_left", extra={"domain": paths.root, "error": str(error)})
        return 0
    gone = 0
    if not any(listed.values()):
        return 0
    domain.view.ask(lambda state: tables.read_whole(state, *_JUDGES))
    with domain.view.read() as state:
        for root, sessions in listed.items():
            known = {paths.packs: "packs", paths.manifests: "manifests"}.get(root, "")
            for session, names in sessions.items():
                gone += _sweep_session(fs, state, root, session, names, known)
    if gone:
        log.info("orphans_removed", extra={"domain": paths.root, "files": gone})
    return gone


def _without_files(domain: Domain, table: str, sessions: list[str]) -> list[str]:
    """Those that no live file is of. Nothing is decided by it but where to look."""
    with domain.view.read() as state:
        rows = state.table(table)
        prefixes = [f"{session}/".encode() for session in sessions]
        return [
            session
            for session, prefix in zip(sessions, prefixes, strict=True)
            if next(rows.keys_from(prefix, prefix), None) is None
        ]


def _named(fs: Fs, root: str) -> list[str]:
    """The session directories in `root`; hosts' own ones in tmp/ are named otherwise."""
    return [name for name in fs.listdir(root) if _SESSION.fullmatch(name)]


def names_in(fs: Fs, directory: str) -> list[str]:
    """Names in a directory; none where somebody has planted something else."""
    try:
        return fs.listdir(directory) if fs.stat(directory).kind == "directory" else []
    except FileNotFoundError:
        return []


def readable_names(fs: Fs, directory: str) -> list[str]:
    """names_in, and none where that can't be read: one session's damage must not be in the way of
    all others."""
    try:
        return names_in(fs, directory)
    except OSError as error:
        log.warning("directory_unreadable", extra={"path": directory, "error": str(error)})
        return []


def _sweep_session(
    fs: Fs, state: Tables, root: str, session: str, names: list[str], known: str
) -> int:
    if tables.sessions.get(state, session) is not None:
        return 0
    directory = os.path.join(root, session)
    gone = 0
    for name in names:
        if known and state.table(known).get(os.fsencode(f"{session}/{name}")) is not None:
            continue
        gone += _unlink(fs, os.path.join(directory, name))
    _remove_if_empty(fs, directory)
    return gone


def remove_directory(fs: Fs, directory: str) -> int:
    """Removes a directory of a session, or of a host's, and the files in it; returns how many went.
    A failure is left for the next sweep."""
    names = readable_names(fs, directory)
    gone = sum(_unlink(fs, os.path.join(directory, name)) for name in names)
    _remove_if_empty(fs, directory)
    return gone


def _unlink(fs: Fs, path: str) -> bool:
    try:
        fs.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        log.warning("unlink_failed", extra={"path": path, "error": str(error)})
        return False
    return True


def _remove_if_empty(fs: Fs, directory: str) -> None:
    try:
        if fs.stat(directory).kind != "directory":
            fs.unlink(directory)  # a link, a fifo, a device: the name is all that goes
        elif not fs.listdir(directory):
            fs.rmdir(directory)
    except FileNotFoundError:
        return
    except OSError as error:
        log.debug("rmdir_failed", extra={"path": directory, "error": str(error)})
