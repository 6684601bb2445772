"""A disk in memory that knows what is durable: the state below tests.simfs.

Each file and each directory has what its users see and what is safe. A write is pending until an
fsync of its file, a name (made, changed or taken away) until an fsync_dir of its directory. What a
failed fsync was to make durable becomes *doubtful*: it is still seen, no later fsync covers it, and
a crash may keep it or not, as the kernel's dropped pages do.

`crashed(choice)` is the disk after a power failure: what was synced, and any subset of the rest.
`copied()` is the disk after the death of a process: nothing is lost, nothing is safer than before.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable, Iterable
from typing import TypeAlias

TORN_UNITS = (512, 4096)

Write: TypeAlias = "tuple[int, bytes]"


class File:
    __slots__ = ("allocated", "content", "doubtful", "durable", "ino", "links", "pending")

    def __init__(self, ino: int, durable: bytes = b"", links: int = 0) -> None:
        self.ino = ino
        self.links = links
        self.allocated = 0
        self.content = durable
        self.durable = durable
        self.pending: list[Write] = []
        self.doubtful: list[Write] = []

    @property
    def size_bytes(self) -> int:
        return max(len(self.content), self.allocated)

    def seen(self) -> Hashable:
        return self.ino, self.links, self.allocated, self.content

    def write(self, offset: int, body: bytes) -> None:
        self.pending.append((offset, body))
        self.content = written(self.content, offset, body)

    def sync(self) -> None:
        for offset, body in self.pending:
            self.durable = written(self.durable, offset, body)
        self.pending = []

    def fail_sync(self) -> None:
        self.doubtful += self.pending
        self.pending = []


class Directory:
    __slots__ = ("doubtful", "durable", "ino", "names", "pending", "removed")

    def __init__(self, ino: int) -> None:
        self.ino = ino
        self.removed = False
        self.names: dict[str, Node] = {}
        self.durable: dict[str, Node] = {}
        self.pending: list[Naming] = []
        self.doubtful: list[Naming] = []

    def seen(self) -> Hashable:
        """All that can be read in it and below."""
        return self.ino, tuple((name, node.seen()) for name, node in sorted(self.names.items()))

    def name(self, name: str, node: Node | None) -> None:
        """Makes, changes or (None) takes away a name."""
        self.pending.append((name, node))
        _apply(self.names, name, node)

    def sync(self) -> None:
        for name, node in self.pending:
            _apply(self.durable, name, node)
        # What came after it is durable, so what failed can't come back.
        settled = {name for name, _ in self.pending}
        self.doubtful = [naming for naming in self.doubtful if naming[0] not in settled]
        self.pending = []

    def fail_sync(self) -> None:
        self.doubtful += self.pending
        self.pending = []


Node: TypeAlias = "File | Directory"
Naming: TypeAlias = "tuple[str, Node | None]"


class Disk:
    """A tree of directories and files. One thread at a time."""

    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        self.root = Directory(next(self.numbers))

    def new_file(self) -> File:
        return File(next(self.numbers))

    def new_directory(self) -> Directory:
        return Directory(next(self.numbers))

    def crashed(self, choice: Choice) -> Disk:
        disk = Disk()
        disk.root = _Crash(disk, choice).directory(self.root)
        return disk

    def copied(self) -> Disk:
        disk = Disk()
        disk.numbers = itertools.count(next(self.numbers))
        copies: dict[int, Node] = {}
        disk.root = _copied_directory(self.root, copies)
        return disk


class Choice:
    """What survives of what was not synced: "none", "all", or a seeded random part of it."""

    def __init__(self, word: str, seed: int) -> None:
        self.word = word
        self.source = random.Random(seed)
        self.share = self.source.choice((0.1, 0.5, 0.9))
        self.unit_bytes = self.source.choice(TORN_UNITS)

    def keeps(self) -> bool:
        if self.word == "random":
            return self.source.random() < self.share
        return self.word == "all"

    def parts(self, offset: int, body: bytes) -> Iterable[Write]:
        """What reaches the medium of a write: all of it, none, or some of its sectors."""
        if self.word != "random" or self.source.random() < 0.5:
            return [(offset, body)] if self.keeps() else []
        if self.source.random() < 0.5:  # torn: it went out front to back
            end = self.source.randrange(len(body) // self.unit_bytes + 1) * self.unit_bytes
            end -= offset % self.unit_bytes
            return [(offset, body[:end])] if end > 0 else []
        return [piece for piece in _sectors(offset, body, self.unit_bytes) if self.keeps()]

    def grows(self) -> bool:
        """Whether the size reached the medium though the bytes did not."""
        return self.word == "random" and self.source.random() < 0.5


class _Crash:
    def __init__(self, disk: Disk, choice: Choice) -> None:
        self._disk = disk
        self._choice = choice
        self._files: dict[int, File] = {}

    def directory(self, old: Directory) -> Directory:
        names = dict(old.durable)
        for name, node in (*old.doubtful, *old.pending):
            if self._choice.keeps():
                _apply(names, name, node)
        new = self._disk.new_directory()
        for name, node in sorted(names.items()):
            new.names[name] = self.file(node) if isinstance(node, File) else self.directory(node)
        new.durable = dict(new.names)
        return new

    def file(self, old: File) -> File:
        new = self._files.get(old.ino)
        if new is None:
            new = self._files[old.ino] = self._disk.new_file()
            new.content = new.durable = self._content(old)
            new.allocated = old.allocated
        new.links += 1
        return new

    def _content(self, old: File) -> bytes:
        content = old.durable
        for offset, body in (*old.doubtful, *old.pending):
            for at, piece in self._choice.parts(offset, body):
                content = written(content, at, piece)
        if len(content) < len(old.content) and self._choice.grows():
            content = content.ljust(len(old.content), b"\0")
        return content


def written(content: bytes, offset: int, body: bytes) -> bytes:
    """`content` after a write; a gap reads as zeros."""
    return content[:offset].ljust(offset, b"\0") + body + content[offset + len(body) :]


def _sectors(offset: int, body: bytes, unit_bytes: int) -> list[Write]:
    starts = [0, *range(unit_bytes - offset % unit_bytes, len(body), unit_bytes)]
    ends = [*starts[1:], len(body)]
    return [(offset + start, body[start:end]) for start, end in zip(starts, ends, strict=True)]


def _apply(names: dict[str, Node], name: str, node: Node | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def _copied(node: Node, copies: dict[int, Node]) -> Node:
    found = copies.get(node.ino)
    if found is not None:
        return found
    if isinstance(node, File):
        return _copied_file(node, copies)
    return _copied_directory(node, copies)


def _copied_file(old: File, copies: dict[int, Node]) -> File:
    new = File(old.ino, old.durable, old.links)
    new.content, new.allocated = old.content, old.allocated
    new.pending, new.doubtful = list(old.pending), list(old.doubtful)
    copies[old.ino] = new
    return new


def _copied_directory(old: Directory, copies: dict[int, Node]) -> Directory:
    new = Directory(old.ino)
    copies[old.ino] = new
    new.removed = old.removed
    new.names = {name: _copied(node, copies) for name, node in old.names.items()}
    new.durable = {name: _copied(node, copies) for name, node in old.durable.items()}
    new.pending = [(name, node and _copied(node, copies)) for name, node in old.pending]
    new.doubtful = [(name, node and _copied(node, copies)) for name, node in old.doubtful]
    return new
