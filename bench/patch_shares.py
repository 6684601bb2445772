"""At which share of its base a patch should give way to a whole chunk (docs/adr/0006): simulated.

    python -m bench.patch_shares

Prints the blocks stored a day, for chunks of 256 blocks, when a patch may be each of SHARES of its
chunk. What patches cost for real is bench/patch.py's question.
"""

from __future__ import annotations

import random

from bench.lab import say

SHARES = (1 / 16, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2)
BLOCKS = 256  # of a chunk
DAYS = 365
CHANGED_A_DAY = (0.5, 1, 2.6, 5, 10, 25, 50)


def main() -> int:
    for count in CHANGED_A_DAY:
        stored = [f"{_blocks_a_day(count, share):4.0f}" for share in SHARES]
        say(f"{count:5} blocks a day: {' '.join(stored)}")
    return 0


def _blocks_a_day(count: float, share: float) -> float:
    chance = random.Random(1)
    differ: set[int] = set()
    stored = 0
    for _ in range(DAYS):
        fresh = int(count) + (chance.random() < count % 1)
        differ.update(chance.randrange(BLOCKS) for _ in range(fresh))
        if fresh and len(differ) <= BLOCKS * share:
            stored += len(differ)
        elif fresh:
            stored += BLOCKS
            differ = set()
    return stored / DAYS


if __name__ == "__main__":
    raise SystemExit(main())
