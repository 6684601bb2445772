"""The rounds that several questions go: new repositories, filled ones, and images warm or cold."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.lab import Cost, Lab, drop_all, series, times, warm
from bench.limits import least_write, measure_zstd
from bench.peers import Maker, Program
from bench.results import Figure, Result, Series, ratios

Cache = Literal["warm", "cold"]
Costs = dict[str, list[Cost]]
Acts = Mapping[str, Callable[[], Cost]]
NO_ACTS: Acts = {}
ZSTD = "limit: zstd-1 from memory"


def prepare(path: Path, cache: Cache) -> None:
    """All of a file or directory in the page cache, or nothing of it."""
    if cache == "cold":
        drop_all(path)
        return
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            warm(file)


def first_backups(
    lab: Lab, volume: Path, makers: Mapping[str, Maker], cache: Cache, limits: Acts = NO_ACTS
) -> Costs:
    """The first backup into a new repository of each program, in turns, and with them `limits`."""

    def act(maker: Maker) -> Callable[[], Cost]:
        def run() -> Cost:
            with lab.scratch() as root:
                program = maker(root)
                prepare(volume, cache)
                return program.backup(volume, "first")

        return run

    return lab.interleave({**{who: act(maker) for who, maker in makers.items()}, **limits})


def later_backups(
    lab: Lab,
    before: Path,
    volume: Path,
    makers: Mapping[str, Maker],
    *,
    parent: bool = True,
    limits: Acts = NO_ACTS,
) -> Costs:
    """The backup of `volume` into a repository that has only `before`, in turns; warm. And with
    them `limits`."""
    with lab.scratch() as root:
        filled = {who: Filled(root / who, maker, before) for who, maker in makers.items()}

        def act(one: Filled) -> Callable[[], Cost]:
            def run() -> Cost:
                one.reset()
                prepare(volume, "warm")
                return one.program.backup(volume, "later", "first" if parent else "")

            return run

        return lab.interleave({**{who: act(one) for who, one in filled.items()}, **limits})


class Filled:
    """A repository that holds the backup "first" of one image and can be put back to that."""

    def __init__(self, root: Path, maker: Maker, image: Path) -> None:
        self._root = root
        self._kept = root.with_name(f"{root.name}.kept")
        root.mkdir()
        self.program: Program = maker(root)
        self.program.backup(image, "first")
        _copy_tree(root, self._kept)

    def reset(self) -> None:
        """As it was; at the same path, since some programs remember that."""
        shutil.rmtree(self._root)
        _copy_tree(self._kept, self._root)


@dataclass(frozen=True, slots=True)
class Kept:
    """A backup in a program's repository below `root`, and the image that it must give."""

    root: Path
    program: Program
    backup: str
    image: Path


def restores(lab: Lab, backups: Mapping[str, Kept], cache: Cache) -> Costs:
    """Restores, in turns. Raises ValueError when one does not give its image."""
    with lab.scratch() as out:

        def act(kept: Kept) -> Callable[[], Cost]:
            def run() -> Cost:
                prepare(kept.root, cache)
                target = out / "restored"
                cost = kept.program.restore(kept.backup, target)
                require_same(kept.image, target)
                target.unlink()
                return cost

            return run

        return lab.interleave({who: act(kept) for who, kept in backups.items()})


def least_restore(
    lab: Lab, image: Path, costs: Sequence[Cost], bar: str, what: str
) -> Iterator[Result]:
    """Decompressing and writing the image, each alone; and the restores' times by their greater."""
    decompress, write = [], []
    with lab.scratch() as scratch:
        for _ in costs:
            decompress.append(measure_zstd(image, lab.cores)[1].elapsed_s)
            write.append(least_write(image, scratch).elapsed_s)
    yield Series(what, "limit: decompressing from memory", "s", tuple(decompress))
    yield Series(what, "limit: writing", "s", tuple(write))
    least = tuple(map(max, decompress, write))
    yield Figure(bar, ratios(times(costs), least))


def require_same(image: Path, copy: Path) -> None:
    """Raises ValueError when they differ."""
    if subprocess.run(["cmp", "-s", image, copy], check=False).returncode:
        raise ValueError(f"{copy.name} is not what was backed up")


def zstd_cost(volume: Path, cores: int) -> Cost:
    """What compressing the image's chunks takes when they are in memory."""
    compress, _, stored_bytes = measure_zstd(volume, cores)
    return Cost(compress.elapsed_s, stored_bytes=stored_bytes)


def faster(costs: Costs, bars: str, peers: Sequence[str]) -> Iterator[Result]:
    """For each of the peers that ran: how many times faster vmkeep is, pair by pair."""
    for peer in peers:
        if peer in costs:
            yield Figure(f"{bars}/{peer}", ratios(times(costs[peer]), times(costs["vmkeep"])))


def told(what: str, costs: Costs) -> Iterator[Result]:
    """All series, and vmkeep's peak for its bar."""
    yield from series(what, costs)
    with contextlib.suppress(KeyError):
        peaks = tuple(float(cost.peak_bytes) for cost in costs["vmkeep"])
        yield Figure("memory/peak", peaks)


def _copy_tree(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", "--reflink=auto", source, target], check=True)
