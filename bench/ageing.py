"""A day in the life of an ext4 image: files deleted, upgraded, added, and edited in place.

All of it is done by debugfs and by writing into the blocks of a file: no mount, no root, and with
one seed always the same bytes. Upgraded files are what a new build of them is: the same content,
with pieces put in here and there, so everything behind the first is somewhere else.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.disks import with_sbin

BLOCK = 4096
NOW = 1_700_086_400  # what debugfs takes for the present: a day after the image was made
_LEAST_EDITED_BYTES = 64 << 10
_FILE = re.compile(r"^ *\d+ +10\d{4} \(\d+\) +\d+ +\d+ +(\d+) \S+ \S+ ([\w.+-]+)$", re.ASCII)
_FOLDER = re.compile(r"^ *\d+ +4\d{4} \(\d+\) .* ([\w+-][\w.+-]*)$", re.ASCII)


@dataclass(frozen=True, slots=True)
class Churn:
    """How much happens, each as a part of the image's size."""

    deleted: float
    upgraded: float
    added: float
    edited: float


@dataclass(frozen=True, slots=True)
class Inside:
    """A file inside an image."""

    path: str
    size_bytes: int


def age(image: Path, churn: Churn, chance: random.Random, scratch: Path) -> None:
    """Changes the file system in the image."""
    total = image.stat().st_size
    files = list(_files(image))
    chance.shuffle(files)
    deleted = _taken(files, int(total * churn.deleted))
    upgraded = _taken(files, int(total * churn.upgraded))
    edited = [file for file in files if file.size_bytes >= _LEAST_EDITED_BYTES]
    _edit(image, edited, int(total * churn.edited), chance)
    commands = [f"rm {file.path}" for file in deleted]
    commands += _upgrades(image, upgraded, chance, scratch)
    commands += _additions(int(total * churn.added), chance, scratch)
    debugfs(image, commands)


def debugfs(image: Path, commands: Sequence[str]) -> str:
    """Runs the commands, one after the other; what they said."""
    done = subprocess.run(
        ["debugfs", "-w", "-f", "-", image],
        input="".join(f"{line}\n" for line in commands),
        check=True,
        capture_output=True,
        text=True,
        env={**with_sbin(), "E2FSPROGS_FAKE_TIME": str(NOW)},
    )
    return done.stdout


def _files(image: Path) -> Iterator[Inside]:
    """Those with plain names, folder by folder."""
    level = ["/"]
    while level:
        listed = debugfs(image, [f"ls -l {folder}" for folder in level])
        below: list[str] = []
        for folder, text in zip(level, listed.split("debugfs: ls -l ")[1:], strict=True):
            at = folder.rstrip("/")
            for line in text.splitlines():
                if (file := _FILE.match(line)) and int(file[1]):
                    yield Inside(f"{at}/{file[2]}", int(file[1]))
                elif (deeper := _FOLDER.match(line)) and deeper[1] != "lost+found":
                    below.append(f"{at}/{deeper[1]}")
        level = below


def _taken(files: list[Inside], size_bytes: int) -> list[Inside]:
    """Takes files from the end until they have that size; a file that is too large is passed."""
    taken: list[Inside] = []
    for place in range(len(files) - 1, -1, -1):
        if files[place].size_bytes <= size_bytes:
            size_bytes -= files[place].size_bytes
            taken.append(files.pop(place))
    return taken


def _upgrades(
    image: Path, files: Sequence[Inside], chance: random.Random, scratch: Path
) -> Iterator[str]:
    """Commands that put a new build of each file in its place."""
    builds = [scratch / f"build-{number}" for number in range(len(files))]
    dumps = [f"dump {file.path} {build}" for file, build in zip(files, builds, strict=True)]
    debugfs(image, dumps)
    for file, build in zip(files, builds, strict=True):
        build.write_bytes(rebuilt(build.read_bytes(), chance))
        yield f"rm {file.path}"
        yield f"write {build} {file.path}"


def rebuilt(content: bytes, chance: random.Random) -> bytes:
    """With 1 to 40 bytes more near the start of each 32 KiB, and the rest moved along."""
    pieces = []
    for at in range(0, len(content), 32 << 10):
        piece = content[at : at + (32 << 10)]
        cut = chance.randrange(min(len(piece), 2048))
        pieces += [piece[:cut], chance.randbytes(chance.randint(1, 40)), piece[cut:]]
    return b"".join(pieces)


def _additions(size_bytes: int, chance: random.Random, scratch: Path) -> Iterator[str]:
    """Commands that add logs, 4 MiB or less each."""
    number = 0
    while size_bytes > 0:
        length = min(size_bytes, 4 << 20)
        log = scratch / f"log-{number}"
        log.write_bytes(_log_lines(chance, length))
        yield f"write {log} /messages-{number}.log"
        size_bytes -= length
        number += 1


def _log_lines(chance: random.Random, size_bytes: int) -> bytes:
    made, second = bytearray(), 0
    while len(made) < size_bytes:
        second += chance.randrange(3)
        made += b"2026-11-23T%02d:%02d:%02d vm web[%d]: GET /v1/item/%d 200 %d us\n" % (
            second // 3600 % 24,
            second // 60 % 60,
            second % 60,
            chance.randrange(1000, 1004),
            chance.randrange(10**6),
            chance.randrange(10**5),
        )
    return bytes(made[:size_bytes])


def _edit(image: Path, files: Sequence[Inside], size_bytes: int, chance: random.Random) -> None:
    """Overwrites runs of 1 to 16 blocks in files, until that much is written."""
    with image.open("r+b", buffering=0) as volume:
        for blocks in _blocks(image, files, size_bytes):
            for _ in range(0, len(blocks), 64):
                start = chance.randrange(len(blocks))
                for block in blocks[start : start + chance.randint(1, 16)]:
                    os.pwrite(volume.fileno(), _log_lines(chance, BLOCK), block * BLOCK)
                    size_bytes -= BLOCK
            if size_bytes <= 0:
                return


def _blocks(image: Path, files: Sequence[Inside], edited_bytes: int) -> Iterator[list[int]]:
    """Each file's blocks, of as many files as could be needed."""
    if edited_bytes <= 0:
        return
    said = debugfs(image, [f"blocks {file.path}" for file in files])
    for text in said.split("debugfs: blocks ")[1:]:
        numbers = text.split("\n")[1].split() if "\n" in text else []
        if blocks := [int(number) for number in numbers if number != "0"]:
            yield blocks
