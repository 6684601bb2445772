"""What costs room or time when it is wrong, not data: heartbeats, checkpoints, bundles, files of
nobody."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator

from storage.check.frames import file_digest
from storage.check.report import CheckReport, Finding, Watch
from storage.domain import orphans
from storage.domain.heartbeats import load_beat
from storage.errors import StorageError, translated
from storage.files.bad_places import BadPlace
from storage.files.fs import Fs
from storage.format.paths import DomainPaths
from storage.log.log import Log
from storage.log.rebuild import checkpoint_name
from storage.view import tables
from storage.view.view import View

_SEQ = re.compile("[0-9a-f]{16}")


class HarmlessCheck:
    """Of one domain. `list_files` comes before the log is read, the others after."""

    def __init__(self, fs: Fs, paths: DomainPaths, report: CheckReport, watch: Watch) -> None:
        self._fs = fs
        self._paths = paths
        self._report = report
        self._watch = watch
        self._listed: list[tuple[str, str]] = []  # (table, FileId)

    def list_files(self) -> None:
        """All pack and manifest files: the log that is read later tells whose each is."""
        for table, root in (("packs", self._paths.packs), ("manifests", self._paths.manifests)):
            with translated(root):
                for session in orphans.names_in(self._fs, root):
                    names = self._names_in(os.path.join(root, session))
                    self._listed += [(table, f"{session}/{name}") for name in names]

    def _names_in(self, directory: str) -> list[str]:
        """None of one that can't be read. If it has live files, these are looked at by name."""
        try:
            return orphans.names_in(self._fs, directory)
        except OSError as error:
            self._found("orphan", directory, f"can't be listed: {error.strerror}")
            return []

    def check_heartbeats(self) -> None:
        with translated(self._paths.hosts):
            for path in self._files("heartbeat", self._paths.hosts):
                try:
                    load_beat(self._fs, path)
                except FileNotFoundError:
                    continue
                except StorageError as error:
                    self._found("heartbeat", path, str(error))

    def check_checkpoints(self) -> None:
        """Reads each whole, and holds it against its name."""
        with translated(self._paths.checkpoints):
            for path in self._files("checkpoint", self._paths.checkpoints):
                name = os.path.basename(path)
                seq = name[:16]
                try:
                    digest = file_digest(self._fs, path, self._report, self._watch)
                except BadPlace as error:
                    self._found("checkpoint", path, str(error))
                    continue
                if digest is None:
                    continue
                if not _SEQ.fullmatch(seq) or checkpoint_name(int(seq, 16), digest) != name:
                    self._found("checkpoint", path, f"{path}: its content does not match its name")

    def check_bundles(self, records: Log) -> None:
        """Reads each whole, and holds it against the log's records."""
        for path in records.bundles():
            self._watch.pause()
            try:
                records.check_bundle(path)
            except StorageError as error:
                self._found("bundle", path, str(error))

    def check_orphans(self, view: View, packs: Collection[str], manifests: Collection[str]) -> None:
        """What was listed, is not among the live, is of no open session, and is there still:
        what was live when it was listed may have been deleted before the log was read."""
        live = {"packs": packs, "manifests": manifests}
        with view.read() as state:
            for table, name in self._listed:
                session = name.partition("/")[0]
                if name in live[table] or tables.sessions.get(state, session) is not None:
                    continue
                path = os.path.join(self._paths.root, table, name)
                if self._is_there(path):
                    self._found("orphan", path, "belongs to nobody; the next gc removes it")

    def _files(self, kind: str, directory: str) -> Iterator[str]:
        """The files in there. What somebody has planted instead of one is found."""
        for name in orphans.names_in(self._fs, directory):
            path = os.path.join(directory, name)
            with contextlib.suppress(FileNotFoundError):
                if self._fs.stat(path).kind == "file":
                    yield path
                else:
                    self._found(kind, path, "is no file")

    def _is_there(self, path: str) -> bool:
        with translated(path):
            try:
                self._fs.stat(path)
            except FileNotFoundError:
                return False
        return True

    def _found(self, kind: str, path: str, detail: str) -> None:
        self._report.add(Finding(kind, path, detail))
