"""Whether LMDB can be let loose on a data file that nobody vouches for.

Theory: LMDB follows the numbers in its pages as they are. A wrong one ends the process (a signal),
makes it go in circles, or lets it write over pages that are in use. So the file is walked first, by
plain reads: every page that the state to be opened reaches is inside the file, carries its own
number, has the kind that its place asks for, and is reached once; its nodes fill it exactly; the
list of free pages names none of them. What the rows say is storage.view.lmdb_tables' to prove.

The layout is that of LMDB 0.9's data version 1 (mdb.c: MDB_meta, MDB_db, MDB_page, MDB_node).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field

from storage.errors import ViewDamaged

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_PAGE = struct.Struct("<QHHHH")  # number, pad, flags, lower, upper
_META = struct.Struct("<IIQQ48s48sQQ")  # magic, version, address, map size, free, main, last, txn
_DB = struct.Struct("<IHHQQQQQ")  # pad, flags, depth, branches, leaves, overflows, entries, root
_NODE = struct.Struct("<HHHH")  # low and high half of the size or child, flags, key size
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE = 1, 2, 4, 8
_BIG, _SUB = 1, 2
_NO_ROOT = (1 << 64) - 1
_FREE_FLAGS, _PLAIN_FLAGS = 8, 0  # MDB_INTEGERKEY: of the free list only
_DEEPEST = 32  # LMDB's CURSOR_STACK


@dataclass(frozen=True, slots=True)
class _Tree:
    """What an MDB_db says."""

    flags: int
    depth: int
    pages: tuple[int, int, int]  # branches, leaves, overflows
    entries: int
    root: int

    @classmethod
    def of(cls, raw: bytes) -> _Tree:
        _, flags, depth, branches, leaves, overflows, entries, root = _DB.unpack(raw)
        return cls(flags, depth, (branches, leaves, overflows), entries, root)


@dataclass(slots=True)
class _Counted:
    """What the walk of one tree met."""

    branches: int = 0
    leaves: int = 0
    overflows: int = 0
    entries: int = 0
    big: list[tuple[int, int]] = field(default_factory=list)  # (page, bytes) of overflow values


def require_sound_pages(path: str) -> None:
    """ViewDamaged when LMDB must not open the file, or not all of it can be read. Reads all pages
    that are in use."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            _Walk(fd).run()
        finally:
            os.close(fd)
    except (OSError, struct.error) as error:
        raise ViewDamaged(f"{path}: {error}") from error
    except ViewDamaged as error:
        raise ViewDamaged(f"{path}: {error}") from None


class _Walk:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._page_bytes = 0
        self._last = 0
        self._used = bytearray()

    def run(self) -> None:
        free, main = self._newest_state()
        self._walk(main, _PLAIN_FLAGS, in_main=True)
        for pages in self._walk(free, _FREE_FLAGS):
            for number in _free_pages(pages):
                self._use(number)

    def _newest_state(self) -> tuple[_Tree, _Tree]:
        """The trees of the meta page that LMDB will take; both must be whole."""
        size = self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        found = []
        for number in (0, 1):
            page = self._read(number, _META_PAGE)
            magic, version, _, _, free, main, last, txn = _META.unpack_from(page, _PAGE.size)
            if (magic, version) != (_MAGIC, _VERSION) or _DB.unpack(free)[0] != size:
                raise ViewDamaged(f"meta page {number} is none")
            found.append((txn, last, _Tree.of(free), _Tree.of(main)))
        _, self._last, free, main = max(found, key=lambda meta: meta[0])
        if not 1 <= self._last < 1 << 40 or self._last * size > 64 * os.fstat(self._fd).st_size:
            raise ViewDamaged(f"the last page is said to be {self._last}")
        self._used = bytearray(self._last + 1)
        self._used[:2] = b"\1\1"
        return free, main

    def _read(self, number: int, *kinds: int) -> bytes:
        """A page with its own number on it, of one of these kinds."""
        page = os.pread(self._fd, self._page_bytes, number * self._page_bytes)
        if len(page) < self._page_bytes:
            raise ViewDamaged(f"page {number} is not in the file")
        stamped, _, flags, _, _ = _PAGE.unpack_from(page)
        if stamped != number or flags not in kinds:
            raise ViewDamaged(f"page {number} says that it is page {stamped} of kind {flags}")
        return page

    def _use(self, number: int, count: int = 1) -> None:
        if number < 2 or number + count > len(self._used) or any(self._used[number:][:count]):
            raise ViewDamaged(f"page {number} is used twice, or can't be")
        self._used[number : number + count] = b"\1" * count

    def _walk(self, tree: _Tree, flags: int, *, in_main: bool = False) -> list[bytes]:
        """Walks a tree; the values of the free list. Trees in the main tree are walked too."""
        counted, values = _Counted(), []
        if tree.flags != flags or tree.depth > _DEEPEST:
            raise ViewDamaged(f"a tree has flags {tree.flags} and depth {tree.depth}")
        level = [] if tree.root == _NO_ROOT else [tree.root]
        for depth in range(tree.depth, 0, -1):
            below: list[int] = []
            for number in level:
                self._use(number)
                if depth > 1:
                    below += self._branch(number, counted)
                else:
                    values += self._leaf(number, counted, flags, in_main=in_main)
            level = below
        for number, size in counted.big:
            values += self._big(number, size, counted, keep=flags == _FREE_FLAGS)
        found = (counted.branches, counted.leaves, counted.overflows)
        if level or found != tree.pages or counted.entries != tree.entries:
            raise ViewDamaged(f"a tree of {tree.entries} rows has {counted.entries}")
        return values

    def _branch(self, number: int, counted: _Counted) -> list[int]:
        counted.branches += 1
        page = self._read(number, _BRANCH)
        children = []
        for at in self._nodes(page, number, branch=True):
            low, high, top, _ = _NODE.unpack_from(page, at)
            children.append(low | high << 16 | top << 32)
        return children

    def _leaf(self, number: int, counted: _Counted, flags: int, *, in_main: bool) -> list[bytes]:
        """The values that lie in the page itself, when they are asked for."""
        counted.leaves += 1
        page = self._read(number, _LEAF)
        values = []
        for at in self._nodes(page, number, branch=False):
            counted.entries += 1
            low, high, kind, key_bytes = _NODE.unpack_from(page, at)
            start, size = at + _NODE.size + key_bytes, low | high << 16
            if kind == _BIG:
                counted.big.append((int.from_bytes(page[start : start + 8], "little"), size))
            elif kind == _SUB and in_main and size == _DB.size:
                self._walk(_Tree.of(page[start : start + size]), _PLAIN_FLAGS)
            elif kind or in_main:
                raise ViewDamaged(f"page {number} has a node of kind {kind}")
            elif flags == _FREE_FLAGS:
                if key_bytes != 8:
                    raise ViewDamaged(f"page {number} has no transaction's number in the free list")
                values.append(page[start : start + size])
        return values

    def _nodes(self, page: bytes, number: int, *, branch: bool) -> list[int]:
        """Where the page's nodes begin: they fill it to its end, in whatever order."""
        _, _, _, lower, upper = _PAGE.unpack_from(page)
        if not _PAGE.size < lower <= upper <= len(page) or lower % 2:
            raise ViewDamaged(f"page {number} has no nodes")
        nodes = struct.unpack_from(f"<{(lower - _PAGE.size) // 2}H", page, _PAGE.size)
        end = upper
        for at in sorted(nodes):
            if at != end or at + _NODE.size > len(page):
                raise ViewDamaged(f"page {number} has a node that is not in its place")
            low, high, kind, key_bytes = _NODE.unpack_from(page, at)
            size = 0 if branch else 8 if kind == _BIG else low | high << 16
            end = (at + _NODE.size + key_bytes + size + 1) & ~1
        if end != len(page):
            raise ViewDamaged(f"page {number} has room where nodes should be")
        return list(nodes)

    def _big(self, number: int, size: int, counted: _Counted, *, keep: bool) -> list[bytes]:
        """A value in pages of its own; returned when it is to be kept."""
        head = self._read(number, _OVERFLOW)
        (count,) = struct.unpack_from("<I", head, _PAGE.size - 4)
        if not 0 < _PAGE.size + size <= count * self._page_bytes:
            raise ViewDamaged(f"page {number} is too small for its value")
        self._use(number, count)
        counted.overflows += count
        start = number * self._page_bytes
        if os.pread(self._fd, 1, start + _PAGE.size + size - 1) == b"":
            raise ViewDamaged(f"page {number} ends behind the file")
        return [os.pread(self._fd, size, start + _PAGE.size)] if keep else []


def _free_pages(value: bytes) -> tuple[int, ...]:
    """The numbers in a free list's value: how many, then they, descending."""
    (count,) = struct.unpack_from("<Q", value)
    if 8 * (count + 1) > len(value):
        raise ViewDamaged("the free list is cut short")
    return struct.unpack_from(f"<{count}Q", value, 8)
