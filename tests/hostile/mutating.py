"""Valid bytes, damaged in seeded ways: what a decoder is fed, and what it may answer with."""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Callable, Iterator

from storage.errors import Damaged, PointNewerFormat

NAMED = (Damaged, PointNewerFormat)
# VMKEEP_SOAK=1 multiplies what `make check` tries.
ROUNDS = 2_000 if os.environ.get("VMKEEP_SOAK") == "1" else 100
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF)
WIDE = (0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 1 << 24, 0)


def mutants(sample: bytes, seed: int, rounds: int = ROUNDS) -> Iterator[bytes]:
    """Copies of the sample with one to four faults each, none of them equal to it."""
    chance = random.Random(seed)
    for _ in range(rounds):
        found = bytearray(sample)
        for _ in range(chance.randint(1, 4)):
            _damage(found, chance)
        if found != sample:
            yield bytes(found)


def _damage(found: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(found) + 1) if found else 0
    match chance.randrange(7):
        case 0 if found:
            found[at % len(found)] ^= 1 << chance.randrange(8)
        case 1 if found:
            found[at % len(found)] = chance.choice(EXTREMES)
        case 2 if len(found) >= 4:
            at %= len(found) - 3
            found[at : at + 4] = chance.choice(WIDE).to_bytes(4, "little")
        case 3:
            del found[at : at + chance.randint(1, 40)]
        case 4:
            found[at:at] = chance.randbytes(chance.randint(1, 40))
        case 5:
            piece = found[at : at + chance.randint(1, 64)]
            found[at:at] = piece
        case _:
            found[at : at + 8] = chance.randbytes(len(found[at : at + 8]))


def only_named(decode: Callable[[], object], named: tuple[type[Exception], ...] = NAMED) -> bool:
    """Whether the bytes were refused, and then with a named error; anything else comes through."""
    try:
        decode()
    except named:
        return True
    return False


def peak_bytes(act: Callable[[], object]) -> int:
    """The most memory that Python objects took up meanwhile."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
