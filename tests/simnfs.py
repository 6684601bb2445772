"""Machines that share a simulated disk over NFS, each remembering what it has looked up.

The server (one tests.simdisk.Disk) carries names out durably before it answers. A client believes a
name that it has looked up, there or not, and a listing, until it has itself made a name in that
directory: nfs(5) promises no more without `lookupcache`. Opening asks the server about a name that
is believed to be there; what is believed absent stays absent. Written bytes reach the others at
fsync or close. A file that another machine has unlinked is stale (ESTALE) where it is open.
"""

from __future__ import annotations

import errno
import os

from storage.files.fs import NO_FD
from tests.simdisk import Directory, Disk, File, Node
from tests.simfs import Open, SimFs


class NfsClient(SimFs):
    """One machine. `disk` is the server's."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(disk)
        self._known: dict[int, dict[str, Node | None]] = {}
        self._listed: dict[int, list[str]] = {}
        self._own_unlinks: set[int] = set()
        self.stale_answers = 0

    def expire(self) -> None:
        """Time passes: all that is remembered is asked for again."""
        self._known.clear()
        self._listed.clear()

    def lookup(self, directory: Directory, name: str) -> Node | None:
        known = self._known.setdefault(directory.ino, {})
        if name in known:
            found = known[name]
            if not (isinstance(found, Directory) and found.removed):
                self.stale_answers += found is not directory.names.get(name)
                return found
        known[name] = directory.names.get(name)
        return known[name]

    def opening(self, path: str) -> Node:
        node = self.resolve(path)
        parent, name = self.parent(path)
        if parent.names.get(name) is not node:
            self._known[parent.ino].pop(name)
            node = self.resolve(path)
        return node

    def names_of(self, directory: Directory) -> list[str]:
        names = self._listed.setdefault(directory.ino, list(directory.names))
        self.stale_answers += names != list(directory.names)
        return names

    def open_direct(self, _fd: int, _path: str) -> int:
        return NO_FD

    def creating(self, parent: Directory, name: str) -> None:
        self._known.setdefault(parent.ino, {}).pop(name, None)

    def named(self, parent: Directory, name: str, node: Node | None) -> None:
        parent.name(name, node)
        parent.sync()
        if node is not None:
            self._known.pop(parent.ino, None)
            self._listed.pop(parent.ino, None)
        else:
            self._known.setdefault(parent.ino, {})[name] = None
            listed = self._listed.get(parent.ino, [])
            if name in listed:
                listed.remove(name)

    def unlinked(self, file: File) -> None:
        self._own_unlinks.add(file.ino)

    def closed(self, file: File) -> None:
        file.sync()

    def content(self, opened: Open) -> bytes:
        file = opened.file
        if not file.links and file.ino not in self._own_unlinks:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), opened.path)
        return file.content if opened.own else file.durable


def machines(count: int) -> list[NfsClient]:
    """Clients of one server, which has an empty directory /point."""
    disk = Disk()
    disk.root.name("point", disk.new_directory())
    disk.root.sync()
    return [NfsClient(disk) for _ in range(count)]
