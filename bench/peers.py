"""The programs that vmkeep is held against, each in the settings that suit a disk image best.

- restic: repository version 2, without which it does not compress, at its default level; packs of
  64 MiB; no local cache, since the repository is on this disk; `--force`, so that it reads an image
  whose times say that it is the same.
- borg: fixed chunks of 1 MiB, which are meant for disk images; zstd,1; no encryption; no files
  cache, which would skip an image by its times; sparse, in and out.
- qemu-img: `convert -c` to qcow2 with zstd, 16 coroutines, writing in any order.

A repository is on the disk that vmkeep's point is on; a restore counts until the volume is durable.
restic can't do without encryption. It and borg hash with SHA-256.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from bench.lab import Cost, measured, tree_bytes
from bench.results import Note
from bench.vmkeep import VmkeepPoint

PACK_MIB = 64


class Program(Protocol):
    """A backup program with a repository of its own."""

    name: str

    def backup(self, volume: Path, name: str, parent: str = "", /) -> Cost:
        """Backs an image up, as `name`, reading all of it. `parent`: an earlier backup of the disk,
        for those that ask."""
        ...

    def restore(self, name: str, target: Path) -> Cost:
        """The backup's image as a new file; durable."""
        ...


class Restic:
    name = "restic"

    def __init__(self, root: Path) -> None:
        self._root = root
        self._env = {
            "RESTIC_REPOSITORY": str(root / "restic"),
            "RESTIC_PASSWORD": "bench",
            "RESTIC_PACK_SIZE": str(PACK_MIB),
        }
        self._run("init", "--repository-version", "2")

    def backup(self, volume: Path, name: str, _parent: str = "", /) -> Cost:
        before = tree_bytes(self._root / "restic")
        cost = self._run("backup", "--force", "--host", "vm", "--tag", name, volume)
        return replace(cost, stored_bytes=tree_bytes(self._root / "restic") - before)

    def restore(self, name: str, target: Path) -> Cost:
        out = target.with_name(f"{target.name}.restic")
        cost = self._run("restore", "latest", "--tag", name, "--target", out)
        return _delivered(cost, out, target)

    def _run(self, *words: str | Path) -> Cost:
        return measured(["restic", "--no-cache", "--quiet", *words], env=self._env)[0]


class Borg:
    name = "borg"

    def __init__(self, root: Path) -> None:
        self._repo = root / "borg"
        self._env = {
            "BORG_BASE_DIR": str(root / "borg-home"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }
        self._run("init", "--encryption", "none", self._repo)

    def backup(self, volume: Path, name: str, _parent: str = "", /) -> Cost:
        before = tree_bytes(self._repo)
        settings = ["--chunker-params", "fixed,1048576", "--compression", "zstd,1", "--sparse"]
        cost = self._run(
            "create", *settings, "--files-cache", "disabled", f"{self._repo}::{name}", volume
        )
        return replace(cost, stored_bytes=tree_bytes(self._repo) - before)

    def restore(self, name: str, target: Path) -> Cost:
        out = target.with_name(f"{target.name}.borg")
        out.mkdir()
        cost = self._run("extract", "--sparse", f"{self._repo}::{name}", cwd=out)
        return _delivered(cost, out, target)

    def _run(self, *words: str | Path, cwd: Path | None = None) -> Cost:
        return measured(["borg", *words], env=self._env, cwd=cwd)[0]


class QemuImg:
    name = "qemu-img"

    def __init__(self, root: Path) -> None:
        self._root = root

    def backup(self, volume: Path, name: str, _parent: str = "", /) -> Cost:
        target = self._root / f"{name}.qcow2"
        options = ["-c", "-O", "qcow2", "-o", "compression_type=zstd"]
        cost = self._run("-f", "raw", *options, volume, target)
        return replace(_synced(cost, target), stored_bytes=target.stat().st_blocks * 512)

    def restore(self, name: str, target: Path) -> Cost:
        return _synced(self._run("-O", "raw", self._root / f"{name}.qcow2", target), target)

    def _run(self, *words: str | Path) -> Cost:
        return measured(["qemu-img", "convert", "-m", "16", "-W", *words])[0]


Maker = Callable[[Path], Program]  # makes a new repository in a directory

PEERS: Mapping[str, Maker] = {"restic": Restic, "borg": Borg, "qemu-img": QemuImg}


def installed(*names: str) -> dict[str, Maker]:
    """Those of these peers that are here."""
    return {name: PEERS[name] for name in names if shutil.which(name)}


def present(*names: str) -> dict[str, Maker]:
    """vmkeep, and those of these peers that are here."""
    return {"vmkeep": VmkeepPoint, **installed(*names)}


def absent(*names: str) -> Iterator[Note]:
    """A note for each that is not."""
    for name in names:
        if not shutil.which(name):
            yield Note(f"{name} is not installed here.")


def versions() -> dict[str, str]:
    """What the peers that are here say of themselves, in a few words."""
    return {name: _version(name) for name in PEERS if shutil.which(name)}


def _version(name: str) -> str:
    word = "version" if name == "restic" else "--version"
    said = subprocess.run([name, word], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+(\.\d+)+", said)
    return found.group() if found else "?"


def _delivered(cost: Cost, out: Path, target: Path) -> Cost:
    """Takes the one file that was restored below `out` to its place."""
    [found] = [path for path in out.rglob("*") if path.is_file()]
    cost = _synced(cost, found)
    found.rename(target)
    shutil.rmtree(out)
    return cost


def _synced(cost: Cost, path: Path) -> Cost:
    """With the time that it takes to make the file durable."""
    began_s = time.perf_counter()
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return replace(cost, elapsed_s=cost.elapsed_s + time.perf_counter() - began_s)
