"""Which calls to files are under way in this process, and since when.

A call to a mount that hangs returns late or never, and no signal ends it. So whoever wants to know
what hangs looks at the calls from outside: every one that can hang (storage.files.fs, and the
engine's on volumes) is entered here before it begins and taken out when it is over. That costs well
under a microsecond, and nobody waits for a lock: a dictionary's single steps are atomic.

The table is the process's, as its threads and descriptors are.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

ObjectT = TypeVar("ObjectT")
PlaceT = TypeVar("PlaceT", str, int)
ResultT = TypeVar("ResultT")
Rest = ParamSpec("Rest")

_under_way: dict[int, InFlight] = {}


class InFlight:
    """A context manager around one call, or around several in a row to one server.

    `place`: an absolute path, a descriptor, or the name of a server that is no file system.
    """

    __slots__ = ("began_s", "place")

    def __init__(self, place: str | int) -> None:
        self.place = place

    def __enter__(self) -> None:
        self.began_s = time.monotonic()
        _under_way[id(self)] = self

    def __exit__(self, *_: object) -> None:
        del _under_way[id(self)]

    def path(self) -> str:
        """What the call is about; "" if its descriptor is closed by now. Never hangs: the kernel
        knows the names of open files without asking their medium."""
        if isinstance(self.place, str):
            return self.place
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{self.place}")
        return ""


def longest_in_flight_s(directory: str) -> float:
    """How long the oldest call under way on `directory`, or on what is below it, has taken; or to
    the server of that name."""
    calls = sorted(_under_way.copy().values(), key=lambda call: call.began_s)
    below = directory.rstrip("/") + "/"
    for call in calls:
        path = call.path()
        if path == directory or path.startswith(below):
            return time.monotonic() - call.began_s
    return 0.0


def in_flight(
    method: Callable[Concatenate[ObjectT, PlaceT, Rest], ResultT],
) -> Callable[Concatenate[ObjectT, PlaceT, Rest], ResultT]:
    """For a method whose first argument says which file it is about."""

    def entered(
        self: ObjectT, place: PlaceT, /, *args: Rest.args, **kwargs: Rest.kwargs
    ) -> ResultT:
        with InFlight(place):
            return method(self, place, *args, **kwargs)

    return entered
