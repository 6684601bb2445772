"""How much of what jobs had to say is kept: one that finds damage may have thousands of lines.

They are in memory and in the state, and a list of jobs shows all of them. So only the newest have
all of theirs; of older ones the first line, which is the summary, and how many there were.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from engine.model import Job

KEPT_RESULT_CHARS = 8 << 20


def shortened(newest_first: Iterable[Job]) -> list[Job]:
    """Those of the finished jobs that have to be cut, as they are then. The newest is never."""
    cut = []
    left = KEPT_RESULT_CHARS
    for place, job in enumerate(newest_first):
        left -= sum(map(len, job.result))
        if place and left < 0 and len(job.result) > 2:
            note = f"{len(job.result) - 1} more lines are not kept any more"
            cut.append(replace(job, result=(job.result[0], note)))
    return cut
