"""An initrd for the tests' small machines: a cpio archive ("newc"), which the kernel unpacks."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path


class Initrd:
    """Files are added one after the other; a directory before what is in it."""

    def __init__(self) -> None:
        self._archive = bytearray()

    def directory(self, name: str) -> None:
        self._add(name, stat.S_IFDIR | 0o755)

    def console(self) -> None:
        """The device that the first process's output goes to."""
        self._add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | mode, content)

    def sealed(self) -> bytes:
        """The archive, ended."""
        self._add("TRAILER!!!", 0)
        return bytes(self._archive)

    def _add(
        self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        archive, named = self._archive, name.encode() + b"\0"
        number = len(archive)  # any that does not recur
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(named), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + named
        archive += bytes(-len(archive) % 4) + content
        archive += bytes(-len(archive) % 4)


def with_needs(modules: Path, names: Sequence[str]) -> list[Path]:
    """The kernel modules of these names, each after those that it depends on."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    by_name = {Path(path).name.partition(".")[0]: path for path in needs}

    def ordered() -> Iterator[str]:
        for name in names:
            path = by_name[name]
            yield from reversed(needs[path])
            yield path

    return [modules / path for path in dict.fromkeys(ordered())]
